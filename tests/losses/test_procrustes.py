import pytest
import torch

from vocabridge.losses.procrustes import orthogonal_map, unit_centred


@pytest.mark.parametrize(("source_size", "target_size"), [(4, 7), (7, 4), (5, 5)])
def test_the_map_is_orthogonal_and_no_random_orthogonal_map_does_better(source_size, target_size):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(50, source_size, generator=generator, dtype=torch.float64)
    target = torch.randn(50, target_size, generator=generator, dtype=torch.float64)
    best = orthogonal_map(source, target)
    rank = min(source_size, target_size)
    gram = best.T @ best if source_size <= target_size else best @ best.T
    torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64))

    def inner(candidate):
        return float((source @ candidate.T * target).sum())

    for _ in range(200):
        random = torch.linalg.qr(torch.randn(max(best.shape), rank, generator=generator, dtype=torch.float64)).Q
        candidate = random if source_size <= target_size else random.T
        assert inner(candidate) <= inner(best) + 1e-9


def test_a_rotated_copy_is_mapped_back_exactly():
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(orthogonal_map(source, source @ rotation.T), rotation)


def test_unit_centred():
    vectors = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    result = unit_centred(vectors, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(result, torch.tensor([[2.0, 3.0], [0.0, 0.0]]) / torch.tensor([[13**0.5], [1.0]]))
