"""What keeps a codebook in use on small data: a continuous warm-up, a k-means start, and revival of dead codes.

On large data the plain recipe fills the codebook and all of this is off. On small data the encoder collapses before
the decoder has learned to look at the conditions; so the decoder first trains on continuous latents, the codebook then
starts where those latents are, and codes nobody uses are moved to where images are.
"""

import torch
import torch.nn.functional as F

KMEANS_ITERATIONS = 20
KMEANS_SAMPLES_PER_CODE = 64


def spherical_kmeans(points: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Unit centres ``(num_clusters, D)`` of unit vectors ``(n, D)``, float32; empty clusters restart at random points.

    Fewer points than clusters are repeated with a little noise.
    """
    if len(points) < num_clusters:
        repeats = -(-num_clusters // len(points))
        points = points.repeat(repeats, 1)
        noise = torch.randn(points.shape, generator=generator).to(points.device)
        points = F.normalize(points + 0.01 * noise, dim=-1)
    start = torch.randperm(len(points), generator=generator)[:num_clusters].to(points.device)
    centres = points[start]
    for _ in range(KMEANS_ITERATIONS):
        nearest = (points @ centres.T).argmax(dim=-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=num_clusters)
        fresh = torch.randint(len(points), (num_clusters,), generator=generator).to(points.device)
        centres = F.normalize(torch.where(counts[:, None] > 0, sums, points[fresh]), dim=-1)
    return centres


class CodebookKeeper:
    """Watches a codebook during training and moves its rows when asked; part of every checkpoint.

    Args:
        codebook_size: number of codes.
        continuous_steps: steps without quantizing at the start; the codebook then starts from k-means.
        revive_every: replace codes unused for this many steps; 0 never.
        revive_until: step after which codes are left alone.
        seed: seed of the run.
    """

    def __init__(self, codebook_size: int, continuous_steps: int, revive_every: int, revive_until: int, seed: int):
        self.codebook_size = codebook_size
        self.continuous_steps = continuous_steps
        self.revive_every, self.revive_until = revive_every, revive_until
        self.seed = seed
        self.counts = torch.zeros(codebook_size, dtype=torch.long)
        self.latents: list[torch.Tensor] = []

    def observe(self, step: int, codes: torch.Tensor, latents: torch.Tensor) -> None:
        """Note codes ``(B, N)`` and latents ``(B, N, D)`` of a whole step, all processes in the stream's order."""
        if step < self.continuous_steps:
            self.latents.append(latents.flatten(0, 1).detach().cpu())
            wanted = KMEANS_SAMPLES_PER_CODE * self.codebook_size
            while len(self.latents) > 1 and sum(len(part) for part in self.latents[1:]) >= wanted:
                self.latents.pop(0)
        else:
            self.counts += torch.bincount(codes.flatten().cpu(), minlength=self.codebook_size)
            self.latents = [latents.flatten(0, 1).detach().cpu()]

    def replacements(self, step: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes to move after this step and their new unit vectors, ``(n,)`` and ``(n, D)``, or None."""
        if not self.latents:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        points = torch.cat(self.latents)
        if step + 1 == self.continuous_steps:
            self.latents = []
            return torch.arange(self.codebook_size), spherical_kmeans(points, self.codebook_size, generator)
        in_time = self.continuous_steps < step + 1 <= self.revive_until
        if not self.revive_every or not in_time or (step + 1) % self.revive_every:
            return None
        dead = (self.counts == 0).nonzero().flatten()
        self.counts.zero_()
        if len(dead) == 0:
            return None
        return dead, points[torch.randint(len(points), (len(dead),), generator=generator)]

    def state_dict(self) -> dict:
        return {"counts": self.counts, "latents": torch.cat(self.latents) if self.latents else torch.empty(0)}

    def load_state_dict(self, state: dict) -> None:
        self.counts = state["counts"]
        self.latents = [state["latents"]] if len(state["latents"]) else []
