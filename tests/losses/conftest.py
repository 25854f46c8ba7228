import pytest

from vocabridge.losses import chunked_head


@pytest.fixture(params=[1, 3, 1000])
def rows_per_block(request, monkeypatch):
    """How many rows of the two logits of :class:`head_cases.Case` are given to row functions at once."""
    monkeypatch.setattr(chunked_head, "BLOCK_BYTES", {"cpu": request.param * 8 * (13 + 17)})
    return request.param
