"""How FSDP2 shards a hybrid and its teacher: what it must not do to decay parameters, and what lives where.

accelerate makes one unit of every decoder layer: its parameters are gathered together, in one dtype, when the layer
is called. A linear-attention mixer needs two units of its own. Its decay parameters stay in fp32 whatever the
precision of the rest, and the alignment calls mixers without their layers.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_hybrid.modeling.modeling_hybrid import decoder_layers


def uses_fsdp2(accelerator: Any) -> bool:
    """Whether `accelerator` shards with FSDP2; FSDP1 and loading on one rank only are a `ValueError`."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return False
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version} is not supported: its flat parameters have one dtype, and decay "
            "parameters stay in fp32; set fsdp_version: 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is on, but the student is made in memory, not loaded on rank 0; set "
            "fsdp_cpu_ram_efficient_loading: false."
        )
    return True


def check_zero_stage(accelerator: Any) -> None:
    """Raises a `ValueError` where DeepSpeed would shard the student's weights, which scores and measurements need."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's ZeRO stage 3 leaves a student that can be neither scored nor measured; use FSDP2 "
            "(recipes/accelerate/fsdp2.yaml), which shards the weights too, or zero_stage: 2."
        )


def check_whole_rows(accelerator: Any) -> None:
    """Raises a `ValueError` where a row would be shared by several processes, each with a state of its own."""
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, None) or 1  # not every release of accelerate has both
        if size > 1:
            raise ValueError(
                f"parallelism_config has {name}={size}, but a linear layer needs the whole row: each process would "
                "start its part from an empty state. Set it to 1; docs/scaling.md says what it would take."
            )


def set_precision(accelerator: Any) -> None:
    """
    Keeps master weights and the sums of gradients in fp32 under mixed precision, and lets losses come out in fp32:
    accelerate's default reduces gradients in bf16 and rounds the loss, which here is the model's output, to it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    if policy is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded `module` itself; its parameters are then whole only while its forward runs."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def shard_mixers(student: Any, accelerator: Any) -> None:
    """
    Shards each linear-attention mixer as two units: its modules, in the accelerator's precision, and its own
    parameters (decay rates, step sizes), which are gathered, computed and reduced in fp32. What surrounds the mixers
    is left to accelerate, which passes over what is sharded already.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    mesh = getattr(accelerator, "torch_device_mesh", None)
    options: dict[str, Any] = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    layers = decoder_layers(student)
    for i in student.linear_attention_layers:
        mixer = layers[i].self_attn
        if is_sharded(mixer):
            continue
        if accelerator.mixed_precision != "no":  # as accelerate does it: masters in fp32
            for parameter in mixer.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        modules = [child for child in mixer.children() if any(True for _ in child.parameters())]
        fully_shard(modules, mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(), **options)
        fully_shard(mixer, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)


def shard_teacher(teacher: PreTrainedModel, accelerator: Any) -> PreTrainedModel:
    """Shards a frozen teacher in place, each decoder layer, embedding and head for itself, and returns it."""
    if is_sharded(teacher):
        return teacher
    teacher.requires_grad_(False)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, teacher)


def keep_class_name(model: nn.Module) -> None:
    """
    Gives a sharded model's class the name that it had. FSDP2 makes a class of its own of it, and `save_pretrained`
    would name that one in `config.json` and copy torch's files beside it in place of the model's.
    """
    kind = type(model)
    if is_sharded(model) and kind.__module__.startswith("torch."):
        kind.__name__, kind.__module__ = kind.__mro__[2].__name__, kind.__mro__[2].__module__


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, gathered from all processes where it is sharded; all of them must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
