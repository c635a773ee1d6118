"""Low-rank adapters through peft: adding them, switching them off for the reference, saving and merging them."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from ttpa.config import nearest
from ttpa.errors import InputError

ADAPTER = "default"  # peft's own name for an adapter without one
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraOptions:
    """What an adapter looks like: `W + s B A` with `A [r, in]`, `B [out, r]` and `s = alpha / r`, or `alpha / sqrt(r)`
    with `use_rslora` (Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732). `target_modules` lists names of
    linear layers, or their endings, with commas between them; `all-linear` is every one but the head, which is added as
    `all-linear,lm_head`. There is no dropout: policy and reference must read the same tokens the same way. Raises
    InputError for numbers below 1 and an empty list."""

    r: int = 16
    alpha: int = 32
    target_modules: str = ALL_LINEAR
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                raise InputError(f"--lora_{name} must be at least 1, not {getattr(self, name)}")
        if not self.targets:
            raise InputError(f"--lora_target_modules is empty: give {ALL_LINEAR} or names such as q_proj,v_proj")

    @property
    def targets(self) -> list[str]:
        """The single names of `target_modules`."""
        return [name for name in map(str.strip, self.target_modules.split(",")) if name]


class HeadAdapter(NamedTuple):
    """The adapter of a language model head: `z = W h + scaling B A h` with A `[r, H]` and B `[V, r]`."""

    A_AH: torch.Tensor
    B_VA: torch.Tensor
    scaling: float

    def options(self, hidden_RH: torch.Tensor) -> dict[str, torch.Tensor]:
        """`adapter_RA = scaling A h` and `adapter_VA = B` of `ttpa_kernels.linear_logp`, in the dtype of `hidden_RH`,
        whatever autocast says; both carry gradients."""
        with torch.autocast(hidden_RH.device.type, enabled=False):
            adapter_RA = hidden_RH @ self.A_AH.to(hidden_RH.dtype).T * self.scaling
        return {"adapter_RA": adapter_RA, "adapter_VA": self.B_VA.to(hidden_RH.dtype)}


def add_lora(model: PreTrainedModel, options: LoraOptions, *, seed: int = 0) -> PreTrainedModel:
    """Add an adapter to a model in place and return it: only the adapter's fp32 weights are trained, and before the
    first step the model computes what it did, as B is zero. `seed` alone decides A, so that all ranks agree. With an
    adapter on a tied head the head is no longer the embedding: `tie_word_embeddings` of the config becomes false, while
    the frozen weight below stays one. Raises InputError without peft, for a model that has an adapter, and for targets
    that are no linear layers of the model (naming the nearest)."""
    LoraConfig, inject_adapter_in_model = _peft()
    if lora_layers(model):
        raise InputError("the model already has an adapter: merge it first", path=model.config.name_or_path or None)
    names = _target_names(model, options)
    if any(model.get_submodule(name) is model.get_output_embeddings() for name in names):
        model.config.tie_word_embeddings = model.config.get_text_config(decoder=True).tie_word_embeddings = False
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=0.0,
        target_modules=names,
        use_rslora=options.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU, wherever the model is
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft gives them the dtype of the weight below
    if set(lora_layers(model)) != set(names):
        raise InputError(
            f"--lora_target_modules {options.target_modules}: peft takes some of these names for the experts of "
            f"{model.config.model_type!r} models; name the layers of attention instead, such as q_proj,k_proj"
        )
    return model


def _peft() -> tuple[Any, Any]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("--use_peft needs the package peft: pip install 'ttpa[lora]'") from error
    return LoraConfig, inject_adapter_in_model


def _target_names(model: PreTrainedModel, options: LoraOptions) -> list[str]:
    """Full names of the layers that the options mean; peft shortens them where it can."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    found: set[str] = set()
    for target in options.targets:
        if target == ALL_LINEAR:
            new = {name for name, module in linear.items() if module is not model.get_output_embeddings()}
        else:
            new = {name for name in linear if f".{name}".endswith(f".{target}")}
        if not new:
            close = nearest(target, [*endings, *linear, ALL_LINEAR])
            hint = f"did you mean {close}? There" if close else "there"
            raise InputError(
                f"--lora_target_modules {target}: the model has no linear layer of this name; {hint} "
                f"are {', '.join(endings)}, and {ALL_LINEAR} for all but the head"
            )
        found |= new
    return sorted(found)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def head_adapter(model: PreTrainedModel) -> HeadAdapter | None:
    """The adapter of the language model head, None where it has none."""
    head: Any = model.get_output_embeddings()
    if not hasattr(head, "lora_A"):
        return None
    return HeadAdapter(head.lora_A[ADAPTER].weight, head.lora_B[ADAPTER].weight, head.scaling[ADAPTER])


def save_adapter(model: PreTrainedModel, folder: Path, *, base: str, write: bool = True) -> None:
    """Write the adapter to `folder` as peft does (adapter_model.safetensors, adapter_config.json), for `base`, the
    model's folder or name. Sharded weights are gathered one after the other, so every rank must call this, and one of
    them with `write`. Files get their names when they are whole. Raises InputError where they cannot be written."""
    state = {}
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if write:
                state[f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"] = tensor.detach().cpu().contiguous()
    if not write:
        return
    config: Any = copy.copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        config.save_pretrained(temporary)
        save_file(state, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir()):
            file.replace(folder / file.name)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", path=folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a model with an adapter into a plain one, in place, and return it: each weight becomes `W + s B A`, summed
    in fp32 and rounded to the dtype of W once. A tied head with an adapter gets a weight of its own. Raises InputError
    for weights of 4 bits, which cannot hold the sum."""
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        if not base.weight.is_floating_point():
            raise InputError(
                "an adapter cannot be merged into weights of 4 bits: load the model without --load_in_4bit and merge "
                "the saved adapter into that one",
                path=model.config.name_or_path or None,
            )
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        merged = base.weight.float() + layer.scaling[ADAPTER] * (B.float() @ A.float())
        base.weight = nn.Parameter(merged.to(base.weight.dtype), requires_grad=False)
        model.set_submodule(name, base)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def four_bit_config() -> BitsAndBytesConfig:
    """How to load the frozen weights of QLoRA: 4 bits NF4 with quantised constants, computed in bf16 (Dettmers et al.,
    arXiv 2305.14314). transformers leaves the head and what is tied to it as they are, which the fused head needs.
    Raises InputError without a CUDA GPU, and without bitsandbytes or accelerate."""
    if not torch.cuda.is_available():
        # there bitsandbytes repacks the weights at the first evaluation, and then they hand on no gradient
        raise InputError("--load_in_4bit needs a CUDA GPU; leave it out to train an adapter on a CPU")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--load_in_4bit needs the package {package}: pip install 'ttpa[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
