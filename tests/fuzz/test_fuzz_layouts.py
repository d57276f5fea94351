"""Tensors of any dtype and shape: a named error, or a layout that describes exactly the bytes that are there."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.checkpoint.experts import expert_table
from moestream.checkpoint.layouts import Quantization, find_matrix, read_quantization
from moestream.checkpoint.safetensors import DTYPE_BITS, TensorEntry
from moestream.errors import ModelConfigError, TensorError

NOTHING_SAID = Quantization(None, {})
dtypes = st.sampled_from(["U32", "BF16", "F16", "F32", "U8", "I64"])
sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 128])


def tensor(name, dtype, shape, offset):
    nbytes = DTYPE_BITS[dtype] // 8
    for n in shape:
        nbytes *= n
    return TensorEntry(name, dtype, tuple(shape), 0, offset, nbytes)


@st.composite
def checkpoints(draw, modules):
    """Tensors of modules {path: shape}, each affine or plain; then up to two of them are changed or lost."""
    plan = {}
    for path, (*lead, cols) in modules.items():
        bits, group = draw(st.sampled_from([0, 2, 3, 4, 5, 6, 8])), draw(st.sampled_from([16, 32, 64, 128]))
        floats = draw(st.sampled_from(["BF16", "F16", "F32"]))
        if bits:
            plan[f"{path}.weight"] = ("U32", [*lead, cols * bits // 32])
            plan[f"{path}.scales"] = plan[f"{path}.biases"] = (floats, [*lead, cols // group])
        else:
            plan[path + draw(st.sampled_from(["", ".weight"]))] = (floats, [*lead, cols])
    for name in draw(st.lists(st.sampled_from(sorted(plan)), max_size=2, unique=True)):
        dtype, shape = plan.pop(name)
        match draw(st.sampled_from(["dtype", "axis", "shape", "lost"])):
            case "dtype":
                plan[name] = (draw(dtypes), shape)
            case "axis":
                at = draw(st.integers(0, len(shape) - 1))
                plan[name] = (dtype, [*shape[:at], draw(sizes), *shape[at + 1 :]])
            case "shape":
                plan[name] = (dtype, draw(st.lists(sizes, max_size=4)))
    return {name: tensor(name, *stored, draw(st.integers(0, 2**40))) for name, stored in plan.items()}


@settings(max_examples=500, deadline=None)
@given(tensors=checkpoints({"x": (4, 128)}))
def test_matrix_layout_describes_the_bytes(tensors):
    try:
        found = find_matrix(tensors, NOTHING_SAID, "x", (4, 128))
    except TensorError:
        return
    assert tuple(e.nbytes for e in found.tensors) == found.layout.part_nbytes


STACKS = {f"m.switch_mlp.{p}_proj": (3, 32, 128) for p in ("gate", "up")} | {"m.switch_mlp.down_proj": (3, 128, 32)}
FUSED = {"m.experts.gate_up_proj": (3, 64, 128), "m.experts.down_proj": (3, 128, 32)}
SINGLES = {f"m.experts.{e}.{p}_proj": (32, 128) for e in range(2) for p in ("gate", "up")}
SINGLES |= {f"m.experts.{e}.down_proj": (128, 32) for e in range(2)}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), form=st.sampled_from([STACKS, FUSED, SINGLES]))
def test_expert_ranges_stay_inside_their_tensors(data, form):
    tensors = data.draw(checkpoints(form))
    count = 2 if form is SINGLES else 3
    try:
        table = expert_table(tensors, NOTHING_SAID, "m", num_experts=count, hidden=128, intermediate=32)
    except TensorError:
        return
    assert (table.ranges[:, :, 2] == table.layout.part_nbytes).all()
    assert table.layout.nbytes * count == sum(e.nbytes for e in tensors.values())
    whole = [(e.offset, e.offset + e.nbytes) for e in tensors.values()]
    for _, offset, nbytes in table.ranges.reshape(-1, 3).tolist():
        assert any(begin <= offset and offset + nbytes <= end for begin, end in whole)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["bits", "group_size", "mode", "quant_method", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    config=st.dictionaries(st.sampled_from(["quantization", "quantization_config", "text_config"]), json_values),
    tensors=checkpoints({"x": (4, 128)}),
)
def test_any_quantization_settings(config, tensors):
    try:
        quantization = read_quantization(config, "config.json")
        found = find_matrix(tensors, quantization, "x", (4, 128))
    except (ModelConfigError, TensorError):
        return
    assert tuple(e.nbytes for e in found.tensors) == found.layout.part_nbytes
