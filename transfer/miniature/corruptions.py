"""Imitations of the 15 corruptions of ImageNet-C for the 48 px miniature.

They have the published names and severities 1 to 5, but are NOT the published corruptions: each imitates one in a few
lines, at strengths chosen for 48 px images. Errors measured on them compare only with one another.

Each function takes an image as float [H, W, 3] in 0..1, its strength for one severity and a numpy Generator, and
returns the same shape; `corrupt` clips. All severities of an image share its random numbers: only the strength differs.
"""

import io

import numpy as np
from PIL import Image
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)


def _smooth_noise(shape: tuple[int, int], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian-filtered noise [H, W], scaled to 0..1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return (noise - noise.min()) / (noise.max() - noise.min())


def _moved(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The image sampled at (row, column) + the given offsets [H, W], in px."""
    r, c = np.indices(image.shape[:2])
    at = [r + rows, c + columns]
    return np.stack([ndimage.map_coordinates(image[..., k], at, order=1, mode="reflect") for k in range(3)], axis=-1)


def _line_kernel(length: int, angle: float) -> np.ndarray:
    """A normalised kernel [length, length] with a line of that angle (radians) through its middle."""
    steps = np.linspace(-(length - 1) / 2, (length - 1) / 2, 8 * length)
    kernel = np.zeros((length, length))
    rows = np.rint((length - 1) / 2 + steps * np.sin(angle)).astype(int)
    columns = np.rint((length - 1) / 2 + steps * np.cos(angle)).astype(int)
    np.add.at(kernel, (rows, columns), 1)
    return kernel / kernel.sum()


def gaussian_noise(x, strength, rng):
    return x + strength * rng.standard_normal(x.shape)


def shot_noise(x, strength, rng):
    # The normal approximation of Poisson noise keeps the same random numbers at every severity.
    return x + np.sqrt(x / strength) * rng.standard_normal(x.shape)


def impulse_noise(x, strength, rng):
    hit, salt = rng.random(x.shape), rng.random(x.shape) < 0.5
    return np.where(hit < strength, salt, x)


def defocus_blur(x, strength, rng):
    reach = int(np.ceil(strength))
    rows, columns = np.indices((2 * reach + 1, 2 * reach + 1)) - reach
    disc = np.clip(strength + 0.5 - np.hypot(rows, columns), 0, 1)
    return ndimage.convolve(x, (disc / disc.sum())[..., None], mode="reflect")


def glass_blur(x, strength, rng):
    rows, columns = strength * rng.uniform(-1, 1, (2, *x.shape[:2]))
    return ndimage.gaussian_filter(_moved(x, rows, columns), (0.4, 0.4, 0))


def motion_blur(x, strength, rng):
    return ndimage.convolve(x, _line_kernel(strength, rng.uniform(0, np.pi))[..., None], mode="reflect")


def zoom_blur(x, strength, rng):
    side = x.shape[0]
    r, c = np.indices(x.shape[:2]) - (side - 1) / 2
    zooms = np.linspace(1, 1 + strength, 8)
    return np.mean([_moved(x, r * (1 / z - 1), c * (1 / z - 1)) for z in zooms], axis=0)


def snow(x, strength, rng):
    flakes = (rng.random(x.shape[:2]) < 0.1 * strength).astype(float)
    streaks = 3 * ndimage.convolve(flakes, _line_kernel(5, rng.uniform(np.pi / 4, 3 * np.pi / 4)), mode="wrap")
    grey = x.mean(axis=2, keepdims=True)
    return x + strength * 0.5 * (np.maximum(x, 0.5 * grey + 0.5) - x) + streaks[..., None]


def frost(x, strength, rng):
    crystals = np.clip(4 * np.abs(_smooth_noise(x.shape[:2], 1.5, rng) - 0.5), 0, 1)
    ice = (0.4 + 0.6 * crystals[..., None]) * [0.85, 0.95, 1.0]
    return (1 - strength) * x + strength * ice


def fog(x, strength, rng):
    layers = (weight * _smooth_noise(x.shape[:2], sigma, rng) for sigma, weight in ((12, 0.5), (6, 0.3), (3, 0.2)))
    mist = sum(layers, np.zeros(x.shape[:2]))
    return (x + strength * (0.5 + 0.5 * mist[..., None])) / (1 + strength * 0.6)


def brightness(x, strength, rng):
    return x + strength


def contrast(x, strength, rng):
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + strength * (x - mean)


def elastic_transform(x, strength, rng):
    rows, columns = (strength * 2 * (_smooth_noise(x.shape[:2], 3, rng) - 0.5) for _ in range(2))
    return _moved(x, rows, columns)


def pixelate(x, strength, rng):
    image = Image.fromarray(np.rint(255 * x).astype(np.uint8))
    small = image.resize((strength, strength), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST)) / 255


def jpeg_compression(x, strength, rng):
    file = io.BytesIO()
    Image.fromarray(np.rint(255 * x).astype(np.uint8)).save(file, "JPEG", quality=strength)
    return np.asarray(Image.open(file)) / 255


# Strength at severities 1 to 5, in each function's own unit: standard deviation, photons, share of pixels, radius in
# px, displacement in px, length in px, zoom, amounts of snow, ice and mist, added brightness, remaining contrast,
# displacement in px, side in px, JPEG quality.
STRENGTHS = {
    gaussian_noise: (0.06, 0.1, 0.15, 0.21, 0.3),
    shot_noise: (80, 40, 20, 10, 5),
    impulse_noise: (0.02, 0.05, 0.09, 0.15, 0.23),
    defocus_blur: (0.8, 1.2, 1.8, 2.5, 3.5),
    glass_blur: (0.8, 1.2, 1.8, 2.6, 3.6),
    motion_blur: (3, 5, 7, 9, 13),
    zoom_blur: (0.12, 0.2, 0.3, 0.42, 0.56),
    snow: (0.15, 0.3, 0.5, 0.7, 0.95),
    frost: (0.2, 0.35, 0.48, 0.58, 0.68),
    fog: (0.3, 0.6, 1.0, 1.5, 2.2),
    brightness: (0.1, 0.2, 0.3, 0.4, 0.5),
    contrast: (0.6, 0.45, 0.3, 0.18, 0.08),
    elastic_transform: (1.5, 2.5, 3.5, 5.0, 7.0),
    pixelate: (24, 19, 14, 11, 8),
    jpeg_compression: (40, 25, 15, 10, 5),
}
# In the published order of the 15 names.
CORRUPTIONS = {function.__name__: function for function in STRENGTHS}


def corrupt(image: np.ndarray, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Apply a corruption of CORRUPTIONS at severity 1 to 5 to a uint8 image [H, W, 3]; returns the same kind."""
    function = CORRUPTIONS[name]
    changed = function(image / 255, STRENGTHS[function][severity - 1], rng)
    return np.rint(255 * np.clip(changed, 0, 1)).astype(np.uint8)
