"""Hypothesis strategies for networks and their inputs."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.property.blocks import BLOCKS
from tests.property.networks import JOINS, REFERENCES, SAMPLES, Data, Network, Step

SHAPES = ((12,), (3, 4), (1,), (5,), (4, 3), (2, 3, 2), (1, 4, 5), (20,))
SCALES = (1.0, 1.0, 1.0, 10.0, 1e3, 1e-3, 1e6, 1e-8, 1e-30, 1e30, 1e150, 1e-310)
BATCHED = [name for name, block in BLOCKS.items() if not block.fixes_rows]
#: Blocks with a loop over the rows take two captures, and are drawn seldom.
LOOPED = [name for name, block in BLOCKS.items() if block.fixes_rows]
#: Blocks of many operations, which take long to capture.
SLOW = (
    "recurrent",
    "recurrent cell",
    "experts",
    "attention module",
    "encoder layer",
    "decoder layer",
)
FAST = [name for name in BATCHED if name not in SLOW and not name.startswith("op rnn")]


@st.composite
def steps(draw: st.DrawFn, small: bool = False) -> Step:
    """Draw one step; a small step is captured quickly."""
    looped = not small and draw(st.integers(0, 29)) == 29
    names = FAST if small else LOOPED if looped else BATCHED
    name = draw(st.sampled_from(names))
    block = BLOCKS[name]
    return Step(
        name,
        of=tuple(draw(st.integers(0, 3)) for _ in range(block.arity)),
        layout=draw(st.sampled_from(block.layouts)),
        join=draw(st.sampled_from(["replaced"] * len(JOINS) + list(JOINS))),
        times=1 if small else draw(st.sampled_from([1, 1, 1, 1, 2, 3])),
        mixed=draw(st.booleans()),
        options={key: draw(st.sampled_from(values)) for key, values in block.options.items()},
    )


@st.composite
def networks(draw: st.DrawFn, small: bool = False) -> Network:
    """Draw a network of up to four steps and three inputs; a small network has one step."""
    return Network(
        steps=tuple(draw(st.lists(steps(small), min_size=1, max_size=1 if small else 4))),
        inputs=tuple(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))),
        outputs=draw(st.integers(1, 3)),
        head=draw(st.sampled_from(["linear", "raw"])),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def datasets(draw: st.DrawFn) -> Data:
    """Draw samples and references."""
    return Data(
        sample=draw(st.sampled_from(list(SAMPLES))),
        reference=draw(st.sampled_from(list(REFERENCES))),
        rows=draw(st.integers(1, 4)),
        scale=draw(st.sampled_from(SCALES)),
        seed=draw(st.integers(0, 999)),
    )
