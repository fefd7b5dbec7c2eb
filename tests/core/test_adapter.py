"""From tables of names to axes: both layouts of a library that renamed its modules, fused and packed matrices, true counts."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from recap_cli.core.adapter import Adapter, Heads, Neurons, find_axes, is_linear, matches, names_found, resize
from recap_cli.core.axes import Axis, Cut, check_axes, mask_axes, shapes_of
from recap_cli.core.blocks import block_paths
from recap_cli.core.surgery import cut_model, indices, state_sizes
from recap_cli.plugins.adapters.bert import BERT, DISTILBERT
from recap_cli.plugins.adapters.timm_vit import TIMM_VIT
from recap_cli.plugins.adapters.vit import DINOV2, VIT

WIDTH, HIDDEN, HEADS, HEAD_DIM = 8, 12, 4, 2


def tree(paths: dict[str, nn.Module]) -> nn.Module:
    """A module that holds the given ones under dotted paths."""
    root = nn.Module()
    for path, module in paths.items():
        *parents, name = path.split(".")
        owner = root
        for parent in parents:
            if parent not in dict(owner.named_children()):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, module)
    return root


def block(prefix: str, attention: str, qkv: str, out: str, up: str, down: str, *, rows: int = HIDDEN) -> dict[str, nn.Module]:
    inputs = qkv.split()
    wide = 3 * WIDTH if len(inputs) == 1 else WIDTH
    layers = {f"{prefix}.{name}": nn.Linear(WIDTH, wide) for name in inputs}
    layers |= {f"{prefix}.{name}": nn.Linear(WIDTH, rows) for name in up.split()}
    return {**layers, f"{prefix}.{out}": nn.Linear(WIDTH, WIDTH), f"{prefix}.{down}": nn.Linear(HIDDEN, WIDTH)}


def count_on(model: nn.Module, path: str, **counts: int) -> nn.Module:
    for name, value in counts.items():
        setattr(model.get_submodule(path), name, value)
    return model


EARLIER = (
    "attention.attention",
    "attention.attention.query attention.attention.key attention.attention.value",
    "attention.output.dense",
)
TODAY = ("attention", "attention.q_proj attention.k_proj attention.v_proj", "attention.o_proj")
SELF = ("attention.self", "attention.self.query attention.self.key attention.self.value", "attention.output.dense")
DISTIL = ("attention", "attention.q_lin attention.k_lin attention.v_lin", "attention.out_lin")
FUSED = ("attn", "attn.qkv", "attn.proj")
SPLIT = ("attn", "attn.q_proj attn.k_proj attn.v_proj", "attn.proj")

LAYOUTS = {
    "bert": (BERT, "bert.encoder.layer.3", SELF, ("intermediate.dense", "output.dense"), "attention_head_size", 1),
    "bare bert": (BERT, "encoder.layer.3", SELF, ("intermediate.dense", "output.dense"), "attention_head_size", 1),
    "distilbert": (DISTILBERT, "distilbert.transformer.layer.3", DISTIL, ("ffn.lin1", "ffn.lin2"), "attention_head_size", 1),
    "vit": (VIT, "vit.layers.3", TODAY, ("mlp.fc1", "mlp.fc2"), "head_dim", 1),
    "vit, earlier": (VIT, "vit.encoder.layer.3", EARLIER, ("intermediate.dense", "output.dense"), "attention_head_size", 1),
    "deit, earlier": (VIT, "deit.encoder.layer.3", EARLIER, ("intermediate.dense", "output.dense"), "attention_head_size", 1),
    "dinov2": (DINOV2, "dinov2.encoder.layer.3", TODAY, ("mlp.fc1", "mlp.fc2"), "head_dim", 1),
    "dinov2, earlier": (DINOV2, "dinov2.encoder.layer.3", EARLIER, ("mlp.fc1", "mlp.fc2"), "attention_head_size", 1),
    "dinov2 SwiGLU": (DINOV2, "dinov2.encoder.layer.3", TODAY, ("mlp.gate_proj mlp.up_proj", "mlp.down_proj"), "head_dim", 1),
    "dinov2 SwiGLU, earlier": (
        DINOV2, "dinov2.encoder.layer.3", EARLIER, ("mlp.weights_in", "mlp.weights_out"), "attention_head_size", 2,
    ),
    "timm": (TIMM_VIT, "blocks.3", FUSED, ("mlp.fc1", "mlp.fc2"), "head_dim", 1),
    "timm, separate": (TIMM_VIT, "blocks.3", SPLIT, ("mlp.fc1", "mlp.fc2"), "head_dim", 1),
    "timm, packed gate": (TIMM_VIT, "blocks.3", FUSED, ("mlp.fc1", "mlp.fc2"), "head_dim", 2),
    "timm SwiGLU": (TIMM_VIT, "blocks.3", FUSED, ("mlp.fc1_g mlp.fc1_x", "mlp.fc2"), "head_dim", 1),
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    _, path, (attention, qkv, out), (up, down), head_dim, chunks = LAYOUTS[name]
    model = tree(block(path, attention, qkv, out, up, down, rows=chunks * HIDDEN))
    return count_on(model, f"{path}.{attention}", **{head_dim: HEAD_DIM})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_one_axis_of_heads_and_one_of_neurons(name):
    adapter, path, *_ = LAYOUTS[name]
    model = model_of(name)
    axes = find_axes(adapter, model)
    assert [(axis.name, axis.size, axis.layer) for axis in axes] == [
        (f"{path}.heads", HEADS, 3),
        (f"{path}.neurons", HIDDEN, 3),
    ]
    assert check_axes(axes, shapes_of(model.named_parameters())) == []
    assert {cut.couple for axis in axes for cut in axis.cuts} == {""}  # rows and columns of a group move together


@pytest.mark.parametrize("count", [0, -2, 3])
def test_heads_of_a_size_that_does_not_divide_the_rows_are_no_heads(count: int) -> None:
    model = count_on(model_of("vit"), "vit.layers.3.attention", head_dim=count)
    with pytest.raises(LookupError, match="no heads found"):
        find_axes(VIT, model)


def test_heads_may_be_one_wide_and_one_alone() -> None:
    layers = {f"vit.layers.0.attention.{name}": nn.Linear(WIDTH, 1) for name in ("q_proj", "k_proj", "v_proj")}
    layers |= {"vit.layers.0.attention.o_proj": nn.Linear(1, WIDTH), "vit.layers.0.mlp.fc1": nn.Linear(WIDTH, HIDDEN)}
    model = tree({**layers, "vit.layers.0.mlp.fc2": nn.Linear(HIDDEN, WIDTH)})
    heads, _ = find_axes(VIT, count_on(model, "vit.layers.0.attention", head_dim=1))
    assert (heads.size, heads.cuts[0].width) == (1, 1)


def mixed(convolution: nn.Module) -> nn.Module:
    """A feedforward block with a convolution between its layers."""
    return tree({"b.0.fc1": nn.Linear(WIDTH, HIDDEN), "b.0.conv": convolution, "b.0.fc2": nn.Linear(HIDDEN, WIDTH)})


MIXED = Adapter((Neurons("b.*", ("fc1",), "fc2", depthwise=("conv",)),), (), ())


def test_a_neuron_owns_its_channel_of_a_depthwise_convolution_which_reads_its_groups():
    model = mixed(nn.Conv2d(HIDDEN, HIDDEN, 3, groups=HIDDEN))
    (neurons,) = find_axes(MIXED, model)
    assert [cut for cut in neurons.cuts if "conv" in cut.param] == [Cut("b.0.conv.weight", 0), Cut("b.0.conv.bias", 0)]
    assert check_axes([neurons], shapes_of(model.named_parameters())) == []
    kept = {"b.0.neurons": torch.arange(HIDDEN) % 3 == 0}
    cut_model(model, indices([neurons], kept, shapes_of(model.named_parameters())))
    resize(MIXED, model, {"b.0.neurons": HIDDEN // 3})
    convolution = model.get_submodule("b.0.conv")
    assert {convolution.groups, convolution.in_channels, convolution.out_channels} == {HIDDEN // 3}
    assert convolution(torch.ones(1, HIDDEN // 3, 3, 3)).shape == (1, HIDDEN // 3, 1, 1)
    assert [axis.size for axis in find_axes(MIXED, model)] == [HIDDEN // 3]


def test_a_convolution_of_one_channel_is_not_depthwise_and_keeps_its_sizes():
    model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Conv2d(4, 6, 1))  # of grey images
    state_sizes(model, ["0.weight", "1.weight"])
    assert [(layer.in_channels, layer.out_channels, layer.groups) for layer in model] == [(1, 4, 1), (4, 6, 1)]


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(HIDDEN, HIDDEN, 3),
        nn.Conv2d(HIDDEN, HIDDEN, 3, groups=2),
        nn.Conv2d(HIDDEN, 2 * HIDDEN, 3, groups=HIDDEN),
        nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH),
        nn.Linear(HIDDEN, HIDDEN),
    ],
    ids=["all channels", "two groups", "two filters each", "of another width", "linear"],
)
def test_a_layer_that_mixes_neurons_is_no_depthwise_convolution(convolution):
    with pytest.raises(LookupError, match="no neurons found"):
        find_axes(MIXED, mixed(convolution))


def test_a_block_without_the_convolution_of_a_table_is_none_of_its_blocks():
    model = tree({"b.0.fc1": nn.Linear(WIDTH, HIDDEN), "b.0.fc2": nn.Linear(HIDDEN, WIDTH)})
    with pytest.raises(LookupError, match="no neurons found"):
        find_axes(MIXED, model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_covers_all_but_the_output_biases(name):
    model = model_of(name)
    cut = {cut.param for axis in find_axes(LAYOUTS[name][0], model) for cut in axis.cuts}
    down = [f"{LAYOUTS[name][1]}.{path}.bias" for path in (LAYOUTS[name][2][2], LAYOUTS[name][3][1])]
    assert set(dict(model.named_parameters())) - cut == set(down)


def test_a_fused_matrix_is_three_cuts_of_one_parameter():
    heads, _ = find_axes(TIMM_VIT, model_of("timm"))
    weight = [cut for cut in heads.cuts if cut.param == "blocks.3.attn.qkv.weight"]
    assert weight == [Cut("blocks.3.attn.qkv.weight", 0, HEAD_DIM, section * WIDTH) for section in range(3)]


def test_a_fused_matrix_without_keys_is_no_attention() -> None:
    model = model_of("timm")
    model.get_submodule("blocks.3.attn").qkv = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(LookupError, match="no heads found"):
        find_axes(TIMM_VIT, model)


def test_a_parameter_that_there_is_not_keeps_its_name_for_the_message() -> None:
    axis = Axis("units", "units", 0, 4, (Cut("gone.weight", 0), Cut("a.weight", 0)))
    (found,) = find_axes(Adapter((), (), (), axes=lambda model: [axis]), tree({"a": nn.Linear(4, 4)}))
    assert found == axis


def test_gate_and_value_of_a_packed_matrix_are_cut_together():
    _, neurons = find_axes(DINOV2, model_of("dinov2 SwiGLU, earlier"))
    offsets = [cut.offset for cut in neurons.cuts if cut.param.endswith("weights_in.weight")]
    assert offsets == [0, HIDDEN]


def test_the_layout_that_was_found_is_named():
    assert names_found(find_axes(VIT, model_of("vit, earlier")))[0].startswith(
        "heads: vit.encoder.layer.*.attention.attention.key"
    )
    assert names_found(find_axes(VIT, model_of("vit")))[0].startswith("heads: vit.layers.*.attention.k_proj")


def grouped(rows: int, *, keys: int | None = None) -> nn.Module:
    """A block whose key and value have so many rows, or the key others."""
    model = model_of("timm, separate")
    attention = model.get_submodule("blocks.3.attn")
    attention.k_proj, attention.v_proj = nn.Linear(WIDTH, keys or rows), nn.Linear(WIDTH, rows)
    return model


def test_query_heads_that_share_a_key_and_a_value_are_one_unit():
    model = grouped(WIDTH // 2)
    heads, _ = find_axes(TIMM_VIT, model)
    assert heads.size == HEADS // 2
    assert [(cut.param.split(".")[3], cut.width, cut.couple) for cut in heads.cuts if cut.param.endswith("weight")] == [
        ("q_proj", 2 * HEAD_DIM, ""),
        ("k_proj", HEAD_DIM, "kv"),
        ("v_proj", HEAD_DIM, "kv"),
        ("proj", 2 * HEAD_DIM, ""),
    ]
    assert check_axes([heads], shapes_of(model.named_parameters())) == []
    assert [(axis.name, axis.size) for axis in mask_axes([heads])] == [
        ("blocks.3.heads", WIDTH),
        ("blocks.3.heads/kv", WIDTH // 2),
    ]


def test_counts_of_queries_and_of_keys_are_made_true():
    model = count_on(grouped(WIDTH // 2), "blocks.3.attn", num_heads=4, attn_dim=8, num_kv_heads=2, kv_dim=4, num_kv_groups=2)
    plan = {"blocks.3.heads": torch.tensor([False, True]), "blocks.3.neurons": torch.ones(HIDDEN, dtype=torch.bool)}
    cut_model(model, indices(find_axes(TIMM_VIT, model), plan, shapes_of(model.named_parameters())))
    for _ in range(2):  # of a model that was cut, or is what it shall be
        resize(TIMM_VIT, model, {"blocks.3.heads": 1})
        attention = model.get_submodule("blocks.3.attn")
        counts = (attention.num_heads, attention.attn_dim, attention.num_kv_heads, attention.kv_dim, attention.num_kv_groups)
        assert counts == (2, 2 * HEAD_DIM, 1, HEAD_DIM, 2)


@pytest.mark.parametrize(
    ("rows", "keys"), [(WIDTH // 2, WIDTH), (6, None), (2 * WIDTH, None), (1, None)], ids=["uneven", "6", "more", "half a head"]
)
def test_keys_and_values_that_no_queries_can_share_are_not_taken_for_heads(rows, keys):
    with pytest.raises(LookupError, match="no heads found"):
        find_axes(TIMM_VIT, grouped(rows, keys=keys))


def test_a_fused_matrix_of_shared_keys_is_three_cuts_of_two_widths():
    model = model_of("timm")
    model.get_submodule("blocks.3.attn").qkv = nn.Linear(WIDTH, WIDTH + 2 * WIDTH // 2)
    heads, _ = find_axes(TIMM_VIT, model)
    assert [(c.width, c.offset, c.couple) for c in heads.cuts if c.param == "blocks.3.attn.qkv.weight"] == [
        (2 * HEAD_DIM, 0, ""),
        (HEAD_DIM, WIDTH, "kv"),
        (HEAD_DIM, WIDTH + WIDTH // 2, "kv"),
    ]
    assert check_axes([heads], shapes_of(model.named_parameters())) == []


SEPARATE = TIMM_VIT.tables[1]


def stack(heads: dict[str, int]) -> nn.Module:
    """Blocks under these paths, each with so many heads, and in the first a column and a row of something for each."""
    paths = {}
    for path, count in heads.items():
        width = count * HEAD_DIM
        paths |= {f"{path}.attn.{name}": nn.Linear(WIDTH, width) for name in ("q_proj", "k_proj", "v_proj")}
        paths[f"{path}.attn.proj"] = nn.Linear(width, WIDTH)
    model = tree(paths)
    first = next(iter(heads))
    model.get_submodule(f"{first}.attn").register_parameter("table", nn.Parameter(torch.zeros(5, heads[first])))
    for path in heads:
        count_on(model, f"{path}.attn", head_dim=HEAD_DIM)
    return model


def rows_for_each(heads: int) -> nn.Module:
    """One block with two rows of something for each head."""
    model = stack({"blocks.0": heads})
    model.get_submodule("blocks.0.attn").register_parameter("rows", nn.Parameter(torch.zeros(2 * heads, 5)))
    return model


def test_extra_parameters_have_entries_for_each_head_where_a_block_has_them():
    tables = (replace(SEPARATE, extra=(("attn.table", 1),)),)
    axes = find_axes(Adapter(tables, (), ()), stack({"blocks.0": 4, "blocks.1": 4}))
    assert [[cut for cut in axis.cuts if cut.param.endswith("table")] for axis in axes] == [
        [Cut("blocks.0.attn.table", 1, 1, 0, "attn.table")],
        [],
    ]
    (axis,) = find_axes(Adapter((replace(SEPARATE, extra=(("attn.rows", 0),)),), (), ()), rows_for_each(4))
    assert Cut("blocks.0.attn.rows", 0, 2, 0, "attn.rows") in axis.cuts
    for wrong in (replace(SEPARATE, extra=(("attn.table", 0),)), replace(SEPARATE, extra=(("attn.table", 2),))):
        with pytest.raises(LookupError, match=r"blocks\.0\.attn\.table of shape \(5, 4\) has no entries for each of 4 heads"):
            find_axes(Adapter((wrong,), (), ()), stack({"blocks.0": 4}))


def test_heads_that_all_blocks_share_are_one_axis_and_the_mask_is_each_blocks_own():
    adapter = Adapter((replace(SEPARATE, shared=True, block="**blocks.*"),), (), ())
    model = stack({"a.blocks.0": 4, "a.blocks.1": 4, "b.blocks.0": 3})
    axes = find_axes(adapter, model)
    assert [(axis.name, axis.size, len(axis.cuts)) for axis in axes] == [("a.blocks.heads", 4, 14), ("b.blocks.heads", 3, 7)]
    assert [axis.name for axis in mask_axes(axes)] == ["a.blocks.heads/0", "a.blocks.heads/1", "b.blocks.heads/0"]
    extra = find_axes(Adapter((replace(SEPARATE, shared=True, block="**blocks.*", extra=(("attn.table", 1),)),), (), ()), model)
    assert [cut.couple for cut in extra[0].cuts if cut.param.endswith("table")] == ["0/attn.table"]
    for path in ("a.blocks.0", "a.blocks.1", "b.blocks.0"):
        count_on(model, f"{path}.attn", num_heads=9)
    resize(adapter, model, {"a.blocks.heads": 2})
    assert [model.get_submodule(f"{path}.attn").num_heads for path in ("a.blocks.0", "a.blocks.1", "b.blocks.0")] == [2, 2, 9]
    with pytest.raises(LookupError, match=r"blocks\.heads: blocks that share their heads have 4 of them, and 3"):
        find_axes(adapter, stack({"blocks.0": 4, "blocks.1": 3}))


def test_blocks_of_stages_are_numbered_through():
    adapter = Adapter((replace(SEPARATE, block="stages.*.blocks.*"),), (), ())
    axes = find_axes(adapter, stack({"stages.0.blocks.0": 2, "stages.0.blocks.1": 2, "stages.1.blocks.0": 4}))
    assert [(axis.name, axis.layer) for axis in axes] == [
        ("stages.0.blocks.0.heads", 0),
        ("stages.0.blocks.1.heads", 1),
        ("stages.1.blocks.0.heads", 2),
    ]


class Subclass(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_what_is_a_linear_layer_in_all_but_its_name_only_is_none():
    attention = nn.MultiheadAttention(8, 2)
    assert is_linear(nn.Linear(2, 2))
    assert not is_linear(attention.out_proj)  # whose weight the attention reads by itself
    assert not is_linear(Subclass(2, 2))
    assert not is_linear(nn.Conv2d(2, 2, 1))


@pytest.mark.parametrize(("form", "kind"), [(Heads, "heads"), (Neurons, "neurons")])
def test_an_adapter_with_tables_of_one_kind_gives_axes_of_that_kind(form, kind):
    tables = tuple(table for table in VIT.tables if isinstance(table, form))
    assert [axis.kind for axis in find_axes(Adapter(tables, (), ()), model_of("vit"))] == [kind]
    with pytest.raises(LookupError, match=f"no {kind} found"):
        find_axes(Adapter(tables, (), ()), nn.Linear(2, 2))


def test_a_model_that_no_table_matches_is_a_lookup_error_with_what_was_looked_for():
    with pytest.raises(LookupError, match=r"no heads found: no module is named like .*encoder\.layer"):
        find_axes(BERT, nn.Sequential(nn.Linear(2, 2)))


def test_resize_makes_counts_and_widths_true():
    model = count_on(model_of("timm"), "blocks.3.attn", num_heads=HEADS, attn_dim=WIDTH)
    resize(TIMM_VIT, model, {"blocks.3.heads": 3, "blocks.3.neurons": 5})
    attention = model.get_submodule("blocks.3.attn")
    assert (attention.num_heads, attention.attn_dim, attention.head_dim) == (3, 3 * HEAD_DIM, HEAD_DIM)


def test_resize_invents_no_attribute():
    model = model_of("timm")
    resize(TIMM_VIT, model, {"blocks.3.heads": 3})
    assert not hasattr(model.get_submodule("blocks.3.attn"), "num_heads")


def test_an_adapter_of_functions_goes_its_own_way():
    seen, model = [], nn.Linear(1, 1)
    adapter = Adapter((), (), (), axes=lambda model: [], resize=lambda *given: seen.append(given))
    assert find_axes(adapter, model) == []
    resize(adapter, model, {"a": 1})
    assert seen == [(model, {"a": 1})]


def test_a_transposed_layer_is_cut_along_the_other_dimension():
    class Conv1D(nn.Module):  # as GPT-2's: weight (in, out)
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.nx, self.nf = rows, columns
            self.weight, self.bias = nn.Parameter(torch.zeros(rows, columns)), nn.Parameter(torch.zeros(columns))

    model = tree(
        {"h.0.attn.c_attn": Conv1D(8, 24), "h.0.attn.c_proj": Conv1D(8, 8), "h.0.fc": Conv1D(8, 12), "h.0.out": Conv1D(12, 8)}
    )
    count_on(model, "h.0.attn", head_dim=2)
    tables = (
        Heads(block="h.*", attention="attn", fused="attn.c_attn", out="attn.c_proj", head_dim="head_dim"),
        Neurons(block="h.*", up=("fc",), down="out"),
    )
    heads, neurons = find_axes(Adapter(tables, (), ()), model)
    assert [(cut.dim, cut.offset) for cut in heads.cuts if cut.param.endswith("weight")] == [(1, 0), (1, 8), (1, 16), (0, 0)]
    assert [cut.dim for cut in neurons.cuts] == [1, 0, 0]
    assert check_axes([heads, neurons], shapes_of(model.named_parameters())) == []


def test_patterns_match_whole_names():
    assert matches("bert.pooler.dense.weight", ["*.pooler.*"])
    assert not matches("vit.layers.0.attention.weight", ["*embeddings.*", "head.*"])


def test_a_block_that_is_named_without_a_number_is_layer_0() -> None:
    adapter = Adapter((Neurons("encoder", ("up",), "down"),), (), ())
    model = tree({"encoder.up": nn.Linear(WIDTH, HIDDEN), "encoder.down": nn.Linear(HIDDEN, WIDTH)})
    assert [(axis.name, axis.layer) for axis in find_axes(adapter, model)] == [("encoder.neurons", 0)]


def test_an_axis_that_no_block_holds_is_named_with_what_it_cuts() -> None:
    model = tree({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    cuts = tuple(Cut(f"{name}.weight", 0) for name in "abc")
    with pytest.raises(LookupError, match=r"holds what it cuts \(a\.weight, b\.weight and 1 more\)$"):
        block_paths(model, [Axis("units", "units", 0, 4, cuts)])
    with pytest.raises(LookupError, match=r"holds what it cuts \(a\.weight, b\.weight\)$"):
        block_paths(model, [Axis("units", "units", 0, 4, cuts[:2])])
