"""Who trains and who measures: a patient-disjoint split that depends on nobody else."""

import hashlib

TRAIN, VALIDATION, TEST, EXTERNAL, EXCLUDED = "train", "validation", "test", "external", "excluded"
SPLITS = (TRAIN, VALIDATION, TEST, EXTERNAL, EXCLUDED)
"""Values of a manifest's `split` column."""

SPLIT_KEY = b"fedjax_dp split 1"
"""Default key: public, so that a manifest without a `split` column splits alike everywhere."""

TRAIN_FRACTION, VALIDATION_FRACTION = 0.7, 0.1


def split_of(*, patient: str, image: str, split_key: bytes = SPLIT_KEY) -> str:
    """Split of one image, by keyed BLAKE2b of its patient, or of its path where none is known.

    Guarantees: all images of a patient land in one split, and adding or removing a patient moves
    nobody else, so the split itself reveals nothing about who is there. The proportions, about
    70 / 10 / 20, hold on average only.

    Args:
        patient: the patient's identifier, empty where unknown.
        image: the image's path as the manifest writes it.
        split_key: 1 to 64 bytes; another key is another split.

    Returns:
        "train", "validation" or "test".

    Raises:
        ValueError: the key is empty or longer than 64 bytes.
    """
    if not 1 <= len(split_key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ValueError(
            f"Expected split_key of 1 to {hashlib.blake2b.MAX_KEY_SIZE} bytes, got "
            f"{len(split_key)}. Hash a longer key first."
        )
    name = f"patient:{patient}" if patient else f"image:{image}"
    digest = hashlib.blake2b(name.encode(), key=split_key, digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < TRAIN_FRACTION:
        return TRAIN
    return VALIDATION if position < TRAIN_FRACTION + VALIDATION_FRACTION else TEST
