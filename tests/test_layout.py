"""Layout: places never overlap, sizes add up, and bad fields are named."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vattn.layout import Layout, LayoutError

layouts = st.builds(
    Layout,
    layers=st.integers(1, 5),
    kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 8, 24, 64]),
    max_tokens=st.integers(1, 300),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    rows=st.sampled_from(["head_major", "token_major"]),
    page_bytes=st.sampled_from([None, 4096, 12288, 65536]),
)


def grouped(layout: Layout, group: int) -> Layout:
    return layout.with_(group_layers=1 + group % layout.layers)


def places(layout: Layout, tokens: list[int]) -> list[tuple[int, int]]:
    """Every (byte, size) of one row's heads for the given tokens, over all layers and sides."""
    head, token, _ = (stride * layout.item_bytes for stride in layout.strides)
    return [
        (layout.offset(layer, side) + h * head + t * token, layout.head_dim * layout.item_bytes)
        for layer in range(layout.physical_layers)
        for side in (0, 1)
        for h in range(layout.kv_heads)
        for t in tokens
    ]


@given(layouts, st.integers(0, 4), st.data())
def test_rows_never_overlap_and_stay_in_the_slot(layout, group, data):
    layout = grouped(layout, group)
    last = layout.max_tokens - 1
    tokens = sorted({0, last, data.draw(st.integers(0, last))})
    rows = sorted(places(layout, tokens))
    assert rows[0][0] >= 0
    assert rows[-1][0] + rows[-1][1] <= layout.slot_bytes
    assert all(a + size <= b for (a, size), (b, _) in pairwise(rows))


@given(layouts, st.integers(0, 4), st.data())
def test_a_prefix_lies_in_the_first_pages_of_every_lane(layout, group, data):
    layout = grouped(layout, group)
    tokens = data.draw(st.integers(1, layout.max_tokens))
    pages = layout.pages(tokens)
    assert layout.room(pages) >= tokens
    assert pages == 1 or layout.room(pages - 1) < tokens
    for byte, size in places(layout, [tokens - 1]):
        lane, within = divmod(byte, layout.lane_bytes)
        assert 0 <= lane < layout.lanes
        assert within + size <= pages * layout.page
    assert layout.split(tokens) == divmod(tokens * layout.row_bytes, layout.page)


@given(layouts, st.integers(0, 4))
def test_sizes_add_up(layout, group):
    layout = grouped(layout, group)
    padded = layout.groups * layout.group_layers  # the last group may be short of layers
    row = 2 * layout.kv_heads * layout.head_dim * layout.item_bytes
    assert layout.bytes_per_token == padded * row
    assert layout.slot_bytes == layout.lanes * layout.lane_bytes
    tokens = layout.max_tokens
    mapped = layout.lanes * layout.pages(tokens) * layout.page
    assert layout.waste(tokens) == mapped - tokens * layout.bytes_per_token
    assert 0 <= layout.waste(tokens) < layout.lanes * layout.page


def test_the_figures_of_an_8b_model():
    by_head = Layout(32, 8, 128, 131072)
    assert by_head.bytes_per_token == 128 << 10
    assert (by_head.lanes, by_head.row_bytes, by_head.page) == (512, 256, 8 << 10)
    by_token = by_head.with_(rows="token_major")
    assert (by_token.lanes, by_token.row_bytes, by_token.page) == (64, 2048, 64 << 10)
    together = Layout.all_layers(32, 8, 128, 131072)
    assert (together.lanes, together.row_bytes, together.page) == (1, 128 << 10, 2 << 20)
    assert together.tokens_per_page == 16
    assert together.share_calls(32768) == 1


def test_shared_layers_share_one_place():
    layout = Layout(4, 2, 8, 64, layer_map=(0, 0, 1, 1))
    assert layout.physical_layers == 2
    assert [layout.physical(i) for i in range(4)] == [0, 0, 1, 1]
    assert layout.physical(-1) == 1
    assert layout.layers_of(layout.lanes_per_group) == range(1, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": 0}, "layers"),
        ({"head_dim": -1}, "head_dim"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"dtype": "int8"}, "dtype"),
        ({"rows": "block"}, "rows"),
        ({"page_bytes": 1000}, "page_bytes"),
        ({"group_layers": 3}, "group_layers"),
        ({"layer_map": (0,)}, "layer_map"),
        ({"layer_map": (0, 2)}, "layer_map"),
    ],
)
def test_a_bad_field_is_named(change, named):
    with pytest.raises(LayoutError, match=named):
        Layout(**{"layers": 2, "kv_heads": 2, "head_dim": 8, "max_tokens": 64, **change})


def test_an_unknown_layer_is_refused():
    with pytest.raises(LayoutError, match="layer 2"):
        Layout(2, 2, 8, 64).physical(2)
