"""AdamW with linear warmup and decay in AlgoPerf's interface, for the tests of submissions/algoperf."""

import torch
from algoperf import spec
from algoperf.pytorch_utils import pytorch_setup
from torch.distributed import nn as dist_nn
from torch.optim.lr_scheduler import LambdaLR

USE_PYTORCH_DDP = pytorch_setup()[0]


def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
    del model_state, rng
    optimizer = torch.optim.AdamW(
        model_params.parameters(),
        lr=hyperparameters.learning_rate,
        betas=(1.0 - hyperparameters.one_minus_beta1, hyperparameters.beta2),
        weight_decay=hyperparameters.weight_decay,
    )
    warmup = max(1, int(hyperparameters.warmup_factor * workload.step_hint))
    factor = lambda step: min(1.0, (step + 1) / warmup)  # noqa: E731
    return {"optimizer": optimizer, "scheduler": LambdaLR(optimizer, factor), "averages": [], "calls": 0}


def update_params(
    workload, current_param_container, current_params_types, model_state, hyperparameters, batch, loss_type,
    optimizer_state, eval_results, global_step, rng, train_state=None,
):  # fmt: skip
    del current_params_types, loss_type, eval_results, train_state
    model = current_param_container
    model.train()
    optimizer_state["optimizer"].zero_grad()
    logits, new_model_state = workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=spec.ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=True,
    )
    smoothing = hyperparameters.label_smoothing if hasattr(hyperparameters, "label_smoothing") else 0.0
    loss_dict = workload.loss_fn(
        label_batch=batch["targets"],
        logits_batch=logits,
        mask_batch=batch.get("weights"),
        label_smoothing=smoothing,
    )
    summed, count = loss_dict["summed"], loss_dict["n_valid_examples"]
    if USE_PYTORCH_DDP:
        summed, count = dist_nn.all_reduce(summed), dist_nn.all_reduce(count)
    (summed / count).backward()
    if hasattr(hyperparameters, "grad_clip"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=hyperparameters.grad_clip)
    optimizer_state["optimizer"].step()
    optimizer_state["scheduler"].step()
    optimizer_state["calls"] += 1
    return optimizer_state, current_param_container, new_model_state


def prepare_for_eval(
    workload, current_param_container, current_params_types, model_state, hyperparameters, loss_type, optimizer_state,
    eval_results, global_step, rng,
):  # fmt: skip
    return optimizer_state, current_param_container, model_state


def get_batch_size(workload_name):
    raise ValueError(f"Unsupported workload name: {workload_name}.")


def data_selection(
    workload, input_queue, optimizer_state, current_param_container, model_state, hyperparameters, global_step, rng
):
    return next(input_queue)
