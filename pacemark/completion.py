"""Shell completion of `pacemark` and of `python run.py`: commands, keys with a choice, and their names.

The script holds the words as they are now, so that a Tab costs nothing; a new optimizer appears in a new shell.
"""

from __future__ import annotations

from harness.config.choices import BASE_VARIANT, EXPERIMENT_GROUP, GROUPS, SCALE_GROUP, list_choices, list_variants
from harness.errors import UserError

_KEYS = (
    "seed=", "device=", "precision=", "compile=", "deterministic=", "threads=", "run_to_end=", "pruning=", "records=",
    "label=", "overwrite=", "data=", "optimizer.hyperparameters.", "optimizer.class_path=", "optimizer.clip_norm=",
    "schedule.horizon_fraction=", "schedule.warmup_fraction=", "ruleset.studies=", "ruleset.trials=",
    "executor.workers=", "workload.max_steps=",
)  # fmt: skip

_VALUES = {"device": ("cpu", "cuda"), "precision": ("fp32", "tf32", "bf16"), "pruning": ("none", "exact", "futility")}

_SCRIPT = """\
# Completion of pacemark. In your shell's profile: eval "$(pacemark completion {shell})"
{head}_pacemark() {{
    local word="${{COMP_LINE:0:$COMP_POINT}}"
    word="${{word##* }}"
    local words="{commands} {keys}"
    case "$word" in
{cases}
    esac
    # bash splits at `=` and `:`, so what stands before them is not to be repeated.
    local matches prefix="${{word%"${{word##*[=:]}}"}}"
    matches=$(compgen -W "$words" -- "$word")
    COMPREPLY=()
    local match
    while IFS= read -r match; do
        [ -n "$match" ] && COMPREPLY+=("${{match#"$prefix"}}")
    done <<< "$matches"
}}
complete -o default -o nospace -F _pacemark pacemark
"""


def completion_script(arguments: list[str], commands: list[str]) -> str:
    """The script for a shell, which the caller prints. Raises UserError if it is neither bash nor zsh."""
    shell = arguments[0] if len(arguments) == 1 else ""
    if shell not in ("bash", "zsh"):
        raise UserError("completion: name the shell, as in `pacemark completion bash`; bash and zsh are there")
    values: dict[str, list[str]] = {group: list_choices(group) for group in GROUPS}
    values[f"+{EXPERIMENT_GROUP}"] = list_choices(EXPERIMENT_GROUP)
    variants = {
        variant
        for name in list_choices(SCALE_GROUP)
        for variant in list_variants(*name.rsplit("-", 1))  # "gpt2-mini"
    }
    values["variant"] = [BASE_VARIANT, *sorted(variants)]
    values |= {key: list(choices) for key, choices in _VALUES.items()}
    cases = "\n".join(
        f'        {key}=*) words="{" ".join(f"{key}={name}" for name in names)}" ;;'
        for key, names in values.items()
        if names
    )
    keys = " ".join([*(f"{key}=" for key, names in values.items() if names), *_KEYS])
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _SCRIPT.format(shell=shell, head=head, commands=" ".join(commands), keys=keys, cases=cases)
