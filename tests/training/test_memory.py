from __future__ import annotations

import torch
from random_trees import random_tree
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM
from ttpa_kernels.tree_attention.op import tree_mask

from ttpa.model import packed_logps, use_tree_attention
from ttpa.training.memory import checkpoint_activations, compile_blocks, offload_activations
from ttpa.trees.pack import pack_trees

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
BATCH = pack_trees([random_tree(seed) for seed in (1, 2)])


def make(**sizes: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return use_tree_attention(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **sizes})))


def gradients(model: Qwen3ForCausalLM, batch=BATCH) -> list[torch.Tensor]:
    """Log-probabilities and gradients; a pass with a gradient after one without."""
    with torch.no_grad():
        reference_R = packed_logps(model, batch, report=False)
    logp_R = packed_logps(model, batch, report=False)
    assert torch.equal(logp_R, reference_R)
    model.zero_grad()
    (logp_R * torch.linspace(-1, 1, len(logp_R))).sum().backward()
    return [logp_R.detach(), *(p.grad for p in model.parameters())]


class Operators(TorchDispatchMode):
    """Counts operators, and keeps the shapes that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copied: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if func is torch.ops.aten.copy_.default:
            self.copied.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def products(model: Qwen3ForCausalLM) -> tuple[int, int]:
    """Matrix products and attentions that a pass and its backward pass take."""
    with Operators() as seen:
        packed_logps(model, BATCH, report=False).sum().backward()
    attentions = sum("attention" in name and "backward" not in name for name in seen.names)
    return sum(name == "mm" for name in seen.names), attentions


def test_checkpointing_gives_the_same_bits_and_repeats_what_it_says():
    mm, attention = products(make())
    want = gradients(make())
    repeated = {}
    for mode in ("none", "selective", "full"):
        model = make()
        names = list(model.state_dict())
        checkpoint_activations(model, mode)
        assert list(model.state_dict()) == names
        assert all(map(torch.equal, gradients(model), want)), mode
        found = products(model)
        repeated[mode] = (found[0] - mm, found[1] - attention)
    # a block has 7 products, of which the last is needed by none of its gradients; gate and up are the wide ones
    assert repeated == {"none": (0, 0), "selective": (2 * 3, 0), "full": (6 * 3, attention)}


def test_checkpointing_again_takes_off_what_was_there():
    model = make()
    before = products(model)
    for mode in ("full", "full", "none"):
        checkpoint_activations(model, mode)
    assert products(model) == before


def inputs_kept(model: Qwen3ForCausalLM) -> list[bool]:
    """Whether the input of each block but the first is still there when the pass is over."""
    inputs: list[StorageWeakRef] = []

    def note(_, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.append(StorageWeakRef(arguments[0].untyped_storage()))

    hooks = [block.register_forward_pre_hook(note) for block in model.model.layers[1:]]
    logp_R = packed_logps(model, BATCH, report=False)
    for hook in hooks:
        hook.remove()
    kept = [not reference.expired() for reference in inputs]
    logp_R.sum().backward()
    return kept


def test_offloading_frees_the_inputs_of_blocks_and_gives_the_same_bits():
    want = gradients(make())
    for mode in ("full", "none"):
        model = make()
        checkpoint_activations(model, mode)
        assert inputs_kept(model) == [True, True]
        offload_activations(model)
        assert inputs_kept(model) == [False, False]
        assert all(map(torch.equal, gradients(model), want)), mode


def test_offloading_leaves_weights_where_they_are():
    model = make()
    weights = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    assert len(BATCH.ids_T) not in {size for shape in weights for size in shape}
    offload_activations(model)
    with Operators() as seen:
        packed_logps(model, BATCH, report=False)
    assert len(seen.copied) > 3 * 10 and not weights & set(seen.copied)


def test_compiled_blocks_are_one_graph_for_packs_of_all_lengths():
    """With Triton's kernels in their interpreter, as packs on a CPU are not compiled."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (make(num_hidden_layers=2, num_attention_heads=1) for _ in range(2))
    checkpoint_activations(compiled, "selective")
    compile_blocks(compiled, backend="aot_eager")
    for seed in (1, 2, 4):
        batch = pack_trees([random_tree(seed, num_leaves=2)])
        found = []
        for model, engine in ((plain, "torch"), (compiled, "triton")):
            hidden = model.get_decoder()(
                input_ids=batch.ids_T[None],
                position_ids=batch.position_T[None],
                attention_mask=batch.end_T[None, None, None],
                tree=tree_mask(batch.end_T, engine=engine),
                use_cache=False,
            ).last_hidden_state
            model.zero_grad()
            hidden.square().sum().backward()
            found.append([hidden.detach(), *(p.grad for p in model.model.layers.parameters())])
        for got, want in zip(*found, strict=True):
            assert (got - want).norm() <= 1e-3 * want.norm()  # another engine
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    gradients(compiled)
    compiled(input_ids=BATCH.ids_T[None])
    assert counters["stats"]["unique_graphs"] == 2
