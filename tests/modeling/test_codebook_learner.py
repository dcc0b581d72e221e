"""How the codebook learns."""

import pytest
import torch
from torch.nn import functional as F

from lavit_hf.modeling.codebook_learner import LavitCodebookLearner, nearest_rows, spherical_kmeans
from modeling.tiny_pretraining import pretraining_config
from tiny_models import CODEBOOK_SIZE

WIDTH = 6


def random_rows(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clustered(count: int, num_clusters: int, seed: int = 0) -> torch.Tensor:
    """Tokens that crowd around few directions in one corner of the sphere, as those of a young tokenizer do."""
    centers = F.normalize(random_rows(num_clusters, 99) * 0.3 + torch.eye(WIDTH)[0], dim=-1)
    generator = torch.Generator().manual_seed(seed)
    chosen = centers[torch.randint(num_clusters, (count,), generator=generator)]
    return F.normalize(chosen + 0.02 * torch.randn(count, WIDTH, generator=generator), dim=-1)


def learner(**values) -> LavitCodebookLearner:
    return LavitCodebookLearner(pretraining_config(**{"kmeans_tokens_per_code": 4, **values}))


def learn(state: LavitCodebookLearner, codebook: torch.Tensor, num_steps: int, num_clusters: int = 40) -> int:
    """Runs some steps, and returns the number of codes that the last ten of them used."""
    used: set[int] = set()
    for step in range(num_steps):
        tokens = clustered(96, num_clusters, step)
        if not state.is_initialized:
            state.start(codebook, tokens)
        codes, _ = nearest_rows(tokens, codebook)
        state.update(codebook, tokens, codes)
        used |= set(codes.tolist()) if step >= num_steps - 10 else set()
    return len(used)


def test_a_naive_codebook_collapses_and_each_remedy_mends_it():
    naive = {"kmeans_init": False, "revive_every_steps": 0}
    assert learn(learner(**naive), random_rows(CODEBOOK_SIZE), 60) < 0.4 * CODEBOOK_SIZE
    for remedy in ({"kmeans_init": True}, {"revive_every_steps": 10}):
        assert learn(learner(**{**naive, **remedy}), random_rows(CODEBOOK_SIZE), 60) >= 0.9 * CODEBOOK_SIZE, remedy


def test_averages_follow_the_formula():
    state = learner(kmeans_init=False, revive_every_steps=0, ema_decay=0.9)
    codebook = random_rows(CODEBOOK_SIZE)
    state.start(codebook, codebook)
    before = codebook.clone()
    tokens = random_rows(5, 3)
    codes = torch.tensor([0, 0, 1, 2, 0])
    state.update(codebook, tokens, codes)
    torch.testing.assert_close(state.counts[:4], torch.tensor([0.9 + 0.3, 0.9 + 0.1, 0.9 + 0.1, 0.9]))
    torch.testing.assert_close(state.sums[0], 0.9 * before[0] + 0.1 * (tokens[0] + tokens[1] + tokens[4]))
    torch.testing.assert_close(codebook[:3], F.normalize(state.sums[:3], dim=-1))
    torch.testing.assert_close(codebook[3:], before[3:])
    assert state.uses[:4].tolist() == [3, 1, 1, 0] and int(state.quantized_steps) == 1


def test_rows_that_nothing_uses_for_long_do_not_fade():
    state = learner(kmeans_init=False, revive_every_steps=0, ema_decay=0.01)
    codebook = random_rows(CODEBOOK_SIZE)
    state.start(codebook, codebook)
    expected = codebook[5].clone()
    for step in range(50):
        state.update(codebook, random_rows(4, step), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(codebook[5], expected)
    assert codebook.isfinite().all()


def test_only_dead_codes_are_revived_and_only_in_time():
    state = learner(kmeans_init=False, revive_every_steps=3)
    codebook = random_rows(CODEBOOK_SIZE)
    state.start(codebook, codebook)
    tokens = random_rows(50, 7)
    for step in range(6):
        before = codebook.clone()
        codes = torch.arange(50) % (CODEBOOK_SIZE - 4)  # the last four are never used
        state.update(codebook, tokens, codes)
        is_new = (codebook[-4:] - before[-4:]).abs().amax(dim=-1) > 1e-5
        assert is_new.all() if step in (2, 5) else not is_new.any()
        for row in codebook[-4:][is_new]:
            assert (tokens - row).abs().amax(dim=-1).min() < 1e-6, "a token of the batch"
    assert int(state.num_revived) == 8 and not state.uses.any()
    torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(CODEBOOK_SIZE))


@pytest.mark.parametrize("tokens", [torch.empty(0, WIDTH), torch.eye(WIDTH)[:1].repeat(30, 1)], ids=["none", "equal"])
def test_nothing_to_revive_codes_with(tokens):
    state = learner(kmeans_init=False, revive_every_steps=1)
    codebook = random_rows(CODEBOOK_SIZE)
    codebook[0] = torch.eye(WIDTH)[0]
    state.start(codebook, codebook)
    before = codebook.clone()
    state.update(codebook, tokens, torch.zeros(len(tokens), dtype=torch.long))
    torch.testing.assert_close(codebook, before)
    assert int(state.num_revived) == 0


def test_kmeans_waits_until_it_has_enough_tokens():
    state = learner()
    codebook = random_rows(CODEBOOK_SIZE)
    before = codebook.clone()
    for step in range(2):
        state.start(codebook, clustered(40, 8, step))
        assert not state.is_initialized and torch.equal(codebook, before)
    state.start(codebook, clustered(40, 8, 2))
    assert state.is_initialized and not torch.equal(codebook, before)
    assert state.counts.sum() == pytest.approx(40), "tokens per step"


def test_a_learner_repeats_itself_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    codebooks = []
    for _ in range(2):
        codebooks.append(random_rows(CODEBOOK_SIZE))
        learn(learner(revive_every_steps=2), codebooks[-1], 10)
    assert torch.equal(*codebooks)
    assert torch.equal(torch.get_rng_state(), state)


def test_kmeans_finds_clusters():
    tokens = clustered(600, 12)
    centers, counts = spherical_kmeans(tokens, 12, 20, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centers.norm(dim=-1), torch.ones(12))
    assert counts.sum() == 600 and counts.min() > 0
    _, distances = nearest_rows(tokens, centers)
    assert distances.mean() < 0.01


def test_kmeans_wastes_no_center_on_equal_tokens():
    """Most of a picture may be flat background; centers drawn from it would all be the same."""
    background = torch.eye(WIDTH)[:1].repeat(5000, 1)
    objects = random_rows(50, 4)
    centers, _ = spherical_kmeans(torch.cat([background, objects]), 40, 10, torch.Generator().manual_seed(0))
    assert len(torch.unique((centers * 1e4).round(), dim=0)) == 40


def test_kmeans_with_fewer_tokens_than_centers():
    tokens = random_rows(3)
    centers, counts = spherical_kmeans(tokens, 8, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centers.norm(dim=-1), torch.ones(8))
    assert counts.sum() == 3
