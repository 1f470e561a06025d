"""Display names of metrics, and of the tasks they are for."""

# the Hub's id and the display name of what is measured; the Hub has no task for images of classes
TASKS = {
    "reconstruction": ("image-to-image", "Image reconstruction"),
    "generation": ("unconditional-image-generation", "Image generation"),
}

# display names, where they are not the type with spaces for underscores
_NAMES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fid": "FID",
    "sfid": "sFID",
    "frechet_distance": "FD",
    "spatial_frechet_distance": "spatial FD",
    "inception_score": "Inception score",
    "cross_entropy": "cross-entropy (nats per code)",
    "codebook_usage": "codebook usage (share)",
    "codebook_position_usage_min": "fewest codes at a position",
    "codebook_position_usage_max": "most codes at a position",
}


def metric_name(kind: str, task: str = "", network: str = "") -> str:
    """Display name of a metric, the same in reports, cards and the paper's tables.

    Args:
        kind: its machine-readable type, such as "fid".
        task: reconstruction or generation: it tells rFID from gFID.
        network: whose features it is computed on, where that is not the one the metric is named for.
    """
    name = _NAMES.get(kind, kind.replace("_", " "))
    if kind in ("fid", "frechet_distance"):
        name = task[:1] + name
    return f"{name} ({network})" if network else name
