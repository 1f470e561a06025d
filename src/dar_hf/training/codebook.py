"""What keeps a codebook in use on small data: unquantized steps, a k-means start, and dead codes that are moved.

On large data the plain recipe fills the codebook and all of this is off. On small data the encoder collapses before
the decoder has learned to look at the conditions; so the decoder first trains on unquantized latents, the codebook
then starts where those latents are, and dead codes, which nothing uses, are moved to where images are.
"""

import torch
import torch.nn.functional as F

from ..data import SeedFor, draw_seed

KMEANS_ITERATIONS = 20
KMEANS_SAMPLES_PER_CODE = 64
ASSIGNED_AT_ONCE = 8192  # points; against 16384 codes that is half a gigabyte


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
        nearest = torch.cat([(part @ centres.T).argmax(dim=-1) for part in points.split(ASSIGNED_AT_ONCE)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=num_clusters)
        fresh = torch.randint(len(points), (num_clusters,), generator=generator).to(points.device)
        centres = F.normalize(torch.where(counts[:, None] > 0, sums, points[fresh]), dim=-1)
    return centres


class CodebookKeeper:
    """Watches a codebook during training and moves its rows when asked; part of every checkpoint.

    Args:
        codebook_size: number of codes.
        unquantized_steps: steps without quantizing at the start; the codebook then starts from k-means.
        dead_code_interval: every N steps, the codes that none of these N steps used are moved; 0 for never.
        stop_step: no code is moved from this step on.
        seed: seed of the run.
    """

    def __init__(self, codebook_size: int, unquantized_steps: int, dead_code_interval: int, stop_step: int, seed: int):
        self.codebook_size = codebook_size
        self.unquantized_steps = unquantized_steps
        self.dead_code_interval = dead_code_interval
        self.stop_step = stop_step
        self.seed = seed
        self.counts = torch.zeros(codebook_size, dtype=torch.long)
        self.latents = torch.empty(0)

    def watches(self, step: int) -> bool:
        """Whether anything will be made of what `observe` is told of this step."""
        return step < self.unquantized_steps or (self.dead_code_interval > 0 and step < self.stop_step)

    def observe(self, step: int, codes: torch.Tensor, latents: torch.Tensor) -> None:
        """Note codes ``(B, N)`` and latents ``(B, N, D)`` of a whole step, all processes in the stream's order."""
        latents = latents.detach().float().flatten(0, 1).cpu()
        if step < self.unquantized_steps:
            wanted = KMEANS_SAMPLES_PER_CODE * self.codebook_size
            self.latents = torch.cat([self.latents.reshape(-1, latents.shape[1]), latents])[-wanted:]
        else:
            self.counts += torch.bincount(codes.flatten().cpu(), minlength=self.codebook_size)
            self.latents = latents

    def replacements(self, step: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes to move after this step and their new unit vectors, ``(n,)`` and ``(n, D)``, or None."""
        generator = torch.Generator().manual_seed(draw_seed(self.seed, SeedFor.CODEBOOK, step))
        quantized_steps = step + 1 - self.unquantized_steps
        if quantized_steps == 0:
            points = self.latents
            self.latents = torch.empty(0)
            return torch.arange(self.codebook_size), spherical_kmeans(points, self.codebook_size, generator)
        is_due = self.dead_code_interval > 0 and quantized_steps % self.dead_code_interval == 0
        if quantized_steps < 0 or not is_due or step >= self.stop_step:
            return None
        dead = (self.counts == 0).nonzero().flatten()
        self.counts.zero_()
        if len(dead) == 0:
            return None
        return dead, self.latents[torch.randint(len(self.latents), (len(dead),), generator=generator)]

    def state_dict(self) -> dict:
        return {"counts": self.counts, "latents": self.latents}

    def load_state_dict(self, state: dict) -> None:
        self.counts = state["counts"]
        self.latents = state["latents"]
