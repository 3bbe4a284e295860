"""Fingerprints: short binary codes by which copies of training images are known, though no image can be made of them.

The signs of a code that the head was trained to give all versions of an image alike, compared by Hamming distance, as
in semantic hashing (Salakhutdinov and Hinton, 2009).
"""

import torch


def pack(code: torch.Tensor) -> torch.Tensor:
    """The signs of codes (N, B) as uint8 (N, B / 8)."""
    bits = (code > 0).view(len(code), -1, 8).to(torch.uint8)  # (N, B / 8, 8)
    return (bits << _places(code.device)).sum(2, dtype=torch.uint8)


def unpack(fingerprints: torch.Tensor) -> torch.Tensor:
    """-1 and 1, in fp32 (M, B), of fingerprints uint8 (M, B / 8)."""
    bits = (fingerprints[:, :, None] >> _places(fingerprints.device)) & 1  # (M, B / 8, 8)
    return bits.flatten(1).float() * 2 - 1


def distances(code: torch.Tensor, fingerprints: torch.Tensor) -> torch.Tensor:
    """Bits, int64 (N,), by which each code (N, B) differs from the nearest of fingerprints uint8 (M, B / 8)."""
    if not len(fingerprints):
        return torch.full((len(code),), code.shape[1], device=code.device)
    alike = unpack(pack(code)) @ unpack(fingerprints).T  # (N, M), bits alike minus bits that differ
    return ((code.shape[1] - alike.amax(1)) / 2).round().long()


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
