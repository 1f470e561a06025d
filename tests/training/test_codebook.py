"""K-means, and the keeper that starts and revives the codebook."""

import io

import pytest
import torch
import torch.nn.functional as F

from dar_hf.training.codebook import CodebookKeeper, spherical_kmeans


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def clusters(count, per_cluster, dim=8, spread=0.02):
    """Tight groups of unit vectors around the axes of the space and their opposites."""
    centres = torch.cat([torch.eye(dim), -torch.eye(dim)])[:count]
    points = centres.repeat_interleave(per_cluster, 0)
    return centres, F.normalize(points + spread * torch.randn(points.shape, generator=generator(1)), dim=-1)


# K-means


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_separated_clusters(seed):
    # two clusters: wherever the start points fall, both centres end up in place
    centres, points = clusters(2, 50)
    found = spherical_kmeans(points, 2, generator(seed))
    assert (found @ centres.T).max(dim=1).values.min() > 0.99
    assert (found @ centres.T).argmax(dim=1).sort().values.tolist() == [0, 1]


def test_kmeans_covers_all_of_many_clusters_with_spare_centres():
    centres, points = clusters(6, 100)
    found = spherical_kmeans(points, 40, generator())
    assert (found @ centres.T).max(dim=0).values.min() > 0.99


def test_kmeans_centres_are_means_of_their_points():
    points = unit(500, 4)
    found = spherical_kmeans(points, 5, generator())
    nearest = (points @ found.T).argmax(dim=1)
    means = F.normalize(torch.stack([points[nearest == k].mean(dim=0) for k in range(5)]), dim=-1)
    assert (means * found).sum(dim=1).min() > 0.999


def test_kmeans_gives_unit_vectors():
    found = spherical_kmeans(unit(100, 6), 9, generator())
    assert found.shape == (9, 6) and found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(9))


def test_fewer_points_than_clusters():
    points = unit(3, 8)
    found = spherical_kmeans(points, 10, generator())
    assert found.shape == (10, 8) and found.isfinite().all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(10))
    assert ((found @ points.T).max(dim=1).values > 0.98).all()
    assert len(found.unique(dim=0)) == 10  # no two the same


def test_one_point():
    found = spherical_kmeans(unit(1, 8), 4, generator())
    assert ((found @ unit(1, 8).T) > 0.98).all()


def test_empty_clusters_restart_at_points():
    points = unit(1, 8).repeat(50, 1)  # all the same: only one cluster can have points
    found = spherical_kmeans(points, 5, generator())
    torch.testing.assert_close(found, points[:5])


def test_kmeans_is_deterministic():
    points = unit(200, 8)
    assert torch.equal(spherical_kmeans(points, 20, generator(3)), spherical_kmeans(points, 20, generator(3)))
    assert not torch.equal(spherical_kmeans(points, 20, generator(3)), spherical_kmeans(points, 20, generator(4)))


def test_kmeans_leaves_its_points_and_the_global_generator_alone():
    points = unit(20, 8)
    before, state = points.clone(), torch.get_rng_state()
    spherical_kmeans(points, 30, generator())
    assert torch.equal(points, before) and torch.equal(torch.get_rng_state(), state)


# The keeper

SIZE = 8


def batch(step, codes=None, size=4, tokens=4):
    """Codes and latents of one step; every code is used unless others are given."""
    if codes is None:
        codes = torch.arange(size * tokens).reshape(size, tokens) % SIZE
    return codes, unit(*codes.shape, 6, seed=100 + step)


def run(keeper, steps, codes=None):
    """Replacements by step, for the steps where there are any."""
    found = {}
    for step in steps:
        keeper.observe(step, *batch(step, codes))
        replacements = keeper.replacements(step)
        if replacements is not None:
            found[step] = replacements
    return found


def test_kmeans_runs_once_at_the_end_of_the_unquantized_steps():
    found = run(CodebookKeeper(SIZE, 5, 0, 100, seed=0), range(12))
    assert list(found) == [4]
    rows, vectors = found[4]
    assert rows.tolist() == list(range(SIZE)) and vectors.shape == (SIZE, 6)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(SIZE))


def test_kmeans_starts_from_the_latents_of_the_unquantized_steps():
    keeper = CodebookKeeper(2, 3, 0, 100, seed=0)
    centres, _ = clusters(2, 1)
    for step in range(3):
        _, points = clusters(2, 10)
        keeper.observe(step, torch.zeros(2, 10, dtype=torch.long), points.reshape(2, 10, 8))
    _, vectors = keeper.replacements(2)
    assert (vectors @ centres.T).max(dim=0).values.min() > 0.99


def test_old_latents_are_forgotten():
    keeper = CodebookKeeper(2, 1000, 0, 1000, seed=0)
    for step in range(200):
        keeper.observe(step, *batch(step))
    kept = keeper.latents
    newest = torch.cat([batch(step)[1].flatten(0, 1) for step in range(192, 200)])
    assert torch.equal(kept, newest)  # 64 for each of 2 codes, 16 a step


def test_dead_codes_move_and_no_others():
    codes = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 5]])
    found = run(CodebookKeeper(SIZE, 0, 4, 100, seed=0), range(4), codes)
    assert list(found) == [3]
    rows, vectors = found[3]
    assert rows.tolist() == [4, 6, 7]
    latents = batch(3, codes)[1].flatten(0, 1)
    assert all(any(torch.equal(vector, latent) for latent in latents) for vector in vectors)


def test_codes_used_once_since_the_last_look_are_alive():
    keeper = CodebookKeeper(SIZE, 0, 4, 100, seed=0)
    rare = torch.zeros(4, 4, dtype=torch.long)
    assert run(keeper, [0]) == {}  # every code once
    assert run(keeper, [1, 2, 3], rare) == {}
    rows, _ = run(keeper, [4, 5, 6, 7], rare)[7]
    assert rows.tolist() == list(range(1, SIZE))  # the count starts anew after every look


def test_revival_stops():
    found = run(CodebookKeeper(SIZE, 0, 3, 9, seed=0), range(30), torch.zeros(2, 2, dtype=torch.long))
    assert list(found) == [2, 5, 8]


def test_no_revival_before_the_codebook_is_in_use():
    found = run(CodebookKeeper(SIZE, 6, 2, 100, seed=0), range(10), torch.zeros(2, 2, dtype=torch.long))
    assert list(found) == [5, 7, 9]
    assert len(found[5][0]) == SIZE and found[7][0].tolist() == list(range(1, SIZE))


def test_codes_are_only_moved_after_the_full_time_unused():
    """The codebook starts at step 5: by step 8 no code can have been unused for 8 steps."""
    found = run(CodebookKeeper(SIZE, 5, 8, 100, seed=0), range(8), torch.zeros(2, 2, dtype=torch.long))
    assert list(found) == [4]


@pytest.mark.parametrize("options, watched", [((5, 0, 9), range(5)), ((2, 4, 9), range(9)), ((0, 0, 9), ())])
def test_nothing_is_watched_that_nothing_is_made_of(options, watched):
    """A keeper that is told of no other steps gives the same replacements."""
    keeper, told = (CodebookKeeper(SIZE, *options, seed=0) for _ in range(2))
    assert [step for step in range(15) if keeper.watches(step)] == list(watched)
    codes = torch.zeros(2, 2, dtype=torch.long)
    found = run(keeper, filter(keeper.watches, range(15)), codes)
    everything = run(told, range(15), codes)
    assert found.keys() == everything.keys()
    assert all(torch.equal(found[step][1], everything[step][1]) for step in found)


def test_nothing_to_do_without_recipe():
    assert run(CodebookKeeper(SIZE, 0, 0, 100, seed=0), range(20), torch.zeros(2, 2, dtype=torch.long)) == {}


def test_replacements_follow_the_seed():
    same = [run(CodebookKeeper(SIZE, 3, 2, 100, seed=s), range(6), torch.zeros(2, 2).long()) for s in (1, 1, 2)]
    assert all(torch.equal(same[0][step][1], same[1][step][1]) for step in same[0])
    assert not torch.equal(same[0][2][1], same[2][2][1])


@pytest.mark.parametrize("stop", [1, 7, 11, 12, 13, 18])
@pytest.mark.parametrize("size", [SIZE, 2])
def test_a_restored_keeper_goes_on_identically(stop, size):
    """Through the warm-up (12 steps, longer than what is kept for 2 codes), k-means and revival."""
    codes = torch.zeros(4, 4, dtype=torch.long)
    keeper = CodebookKeeper(size, 12, 4, 20, seed=0)
    run(keeper, range(stop), codes)
    buffer = io.BytesIO()
    torch.save(keeper.state_dict(), buffer)
    buffer.seek(0)
    restored = CodebookKeeper(size, 12, 4, 20, seed=0)
    restored.load_state_dict(torch.load(buffer))
    expected, found = run(keeper, range(stop, 26), codes), run(restored, range(stop, 26), codes)
    assert list(expected) == list(found)
    for step in expected:
        for wanted, got in zip(expected[step], found[step], strict=True):
            assert torch.equal(wanted, got), f"step {step}"
