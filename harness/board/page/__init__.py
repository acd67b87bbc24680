"""The leaderboard as a folder of web pages that opens from disk, without a server and without a network."""
