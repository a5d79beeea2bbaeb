"""The vision cache: each picture runs through the tower once, and what is dropped runs again."""

import numpy as np
import torch

from umarvel_ray.items.pictures import Picture
from umarvel_ray.model.vision_cache import VisionCache


class Tower:
    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def run_tower(self, pictures):
        self.ran.append([picture.key for picture in pictures])
        return tuple(torch.full((2, 4), float(ord(picture.key))) for picture in pictures)


def shown(keys: str) -> list[Picture]:
    return [Picture(np.zeros((4, 3), np.uint8), (1, 2, 2), key=key) for key in keys]


def test_a_picture_runs_once_and_a_dropped_one_again():
    tower, cache = Tower(), VisionCache(2 * 32)  # room for two pictures
    for keys in ("ab", "aba", "bc", "a"):
        features = cache.features(tower, shown(keys))
        assert {key: feature[0, 0].item() for key, feature in features.items()} == {key: ord(key) for key in keys}
    assert tower.ran == [["a", "b"], ["c"], ["a"]]
    assert cache.nbytes == 64
