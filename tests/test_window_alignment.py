"""Where the larger of two traces has a micro-batch more."""

from types import SimpleNamespace

from trainfit.memory.window_alignment import _insertions  # pyright: ignore[reportPrivateUsage]


def test_a_block_that_runs_alike_with_and_without_saved_activations_is_no_end() -> None:
    """A micro-batch whose graph is not kept frees its input (-1) at once; then 120 events are those of one whose graph is kept.

    That is how SigLIP's image tower begins where every block is recomputed.
    """
    block = list(range(10, 130))
    plain = [1, -1, *block, 2]
    kept = [1, *block, 3, -1]
    keys = SimpleNamespace(small=[9, *kept, 8], large=[9, *plain, *kept, 8])
    assert _insertions(keys) == [(2, 2 + len(plain))]  # pyright: ignore[reportArgumentType]
