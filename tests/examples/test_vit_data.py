"""examples/vit_data.py: pictures that are drawn, of a folder, and of a data set in memory."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import vit_data
import vit_drawn
from test_train_vit import run

CPU = torch.device("cpu")


class TestDrawn:
    def test_the_label_is_the_shape_of_the_largest(self):
        scenes, label = vit_drawn.sample_labelled(500, seed=0)
        there = scenes.radius.masked_fill(scenes.shape < 0, 0)
        largest = there.argmax(1, keepdim=True)
        assert torch.equal(scenes.shape.gather(1, largest)[:, 0], label)
        assert label.bincount(minlength=7).min() > 40

    def test_the_large_one_touches_nothing(self):
        scenes, _ = vit_drawn.sample_labelled(500, seed=0)
        apart = (scenes.centre[:, 1:] - scenes.centre[:, :1]).norm(dim=-1)
        room = apart - scenes.radius[:, 1:] - scenes.radius[:, :1]
        assert room[scenes.shape[:, 1:] >= 0].min() > 0

    def test_the_same_seed_draws_the_same(self):
        pictures, labels = vit_drawn.draw.__wrapped__(6, 16, 1, 0.1, CPU)
        again, _ = vit_drawn.draw.__wrapped__(6, 16, 1, 0.1, CPU)
        other, _ = vit_drawn.draw.__wrapped__(6, 16, 2, 0.1, CPU)
        assert torch.equal(pictures, again)
        assert not torch.equal(pictures, other)
        assert pictures.shape == (6, 3, 16, 16)
        assert labels.shape == (6,)


def loader(pictures, training=True, **options):
    labels = torch.arange(len(pictures))
    return vit_data.InMemory(pictures, labels, 3, training=training, **options)


def random_pictures(n):
    return torch.randint(256, (n, 3, 4, 6), dtype=torch.uint8)


def to_bytes(x):
    return ((x + 1) * 127.5).round().to(torch.uint8)


class TestInMemory:
    def test_processes_share_a_round(self):
        seen = []
        for rank in range(2):
            torch.manual_seed(0)
            share = loader(random_pictures(12), rank=rank, world=2)
            assert len(share) == 2
            seen += [y for _, y in share]
        assert sorted(torch.cat(seen).tolist()) == list(range(12))

    def test_held_out_pictures_stay_as_they_are(self):
        pictures = random_pictures(7)
        batches = loader(pictures, training=False, hflip=1, vflip=1, shift=2)
        assert len(batches) == 3
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(to_bytes(x), pictures)
        assert y.tolist() == list(range(7))

    @pytest.mark.parametrize(("name", "side"), [("hflip", 3), ("vflip", 2)])
    def test_mirrored(self, name, side):
        pictures = random_pictures(6)
        for share in (0, 1):
            for x, y in loader(pictures, **{name: share}):
                expected = pictures[y].flip(side) if share else pictures[y]
                assert torch.equal(to_bytes(x), expected)

    def test_about_as_many_are_mirrored_as_asked_for(self):
        pictures = random_pictures(900)
        mirrored = sum(
            (to_bytes(x) != pictures[y]).flatten(1).any(1).sum().item()
            for x, y in loader(pictures, hflip=0.3)
        )
        assert 200 < mirrored < 340

    def test_shifted(self):
        """Each picture by itself, to all places, and black where nothing is."""
        pictures = random_pictures(120).clamp_(min=1)
        around = torch.nn.functional.pad(pictures, [1] * 4)
        places = set()
        for x, y in loader(pictures, shift=1):
            for picture, n in zip(to_bytes(x), y, strict=True):
                (place,) = (
                    (top, left)
                    for top in range(3)
                    for left in range(3)
                    if torch.equal(picture, around[n, :, top : top + 4, left : left + 6])
                )
                places.add(place)
        assert len(places) == 9


def write_fashion_mnist(root, training, held_out):
    """Pictures `(n, 28, 28)` and labels in the files that torchvision reads."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, arrays in (("train", training), ("t10k", held_out)):
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            # Type (uint8) and number of dimensions, and how long each is.
            head = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())


def greys(n):
    """Pictures that are dark or bright, which is the label."""
    labels = np.arange(n) % 2
    noise = np.random.default_rng(0).integers(0, 100, (n, 28, 28))
    return noise + 150 * labels[:, None, None], labels


class TestDataset:
    def test_it_is_learned(self, tmp_path):
        write_fashion_mnist(tmp_path, greys(96), greys(30))
        words = f"--dataset torch/fashion_mnist --data {tmp_path}"
        options = "--epochs 5 --lr 1e-2 --ema 0.5 --mixup 0"
        result, weights = run(tmp_path / "out", f"{words} {options}")
        assert result["accuracy"] == 1
        assert result["settings"]["dataset"] == "torch/fashion_mnist"
        assert weights["head.weight"].shape == (10, 16)

    def test_pictures(self, tmp_path):
        (pictures, labels), held_out = greys(5), greys(4)
        write_fashion_mnist(tmp_path, (pictures, labels), held_out)
        read = ("torch/fashion_mnist", tmp_path)
        x, y, classes = vit_data.decode(*read, "train", False, 28, CPU)
        assert torch.equal(x, torch.from_numpy(pictures).byte()[:, None].expand(5, 3, 28, 28))
        assert x.is_contiguous()
        assert y.tolist() == labels.tolist()
        assert classes == 10
        x, y, _ = vit_data.decode(*read, "val", False, 14, CPU)
        assert x.shape == (4, 3, 14, 14)
        assert len(y) == 4

    def test_missing(self, tmp_path):
        with pytest.raises(SystemExit, match=r"fashion_mnist is not in .*; --download fetches it"):
            run(tmp_path, f"--dataset torch/fashion_mnist --data {tmp_path}/nowhere")
        with pytest.raises(SystemExit, match="--dataset needs --data"):
            run(tmp_path, "--dataset torch/fashion_mnist")

    def test_download(self, tmp_path, monkeypatch):
        asked = []

        def create_dataset(name, download, **rest):
            asked.append((name, download))
            raise OSError("no network")

        monkeypatch.setattr(vit_data, "create_dataset", create_dataset)
        with pytest.raises(SystemExit, match="no network"):
            run(tmp_path, f"--dataset torch/mnist --data {tmp_path}/new --download")
        assert asked == [("torch/mnist", True)]
        assert (tmp_path / "new").is_dir()


class TestFolder:
    def test_it_is_learned(self, tmp_path):
        for split, count in (("train", 12), ("val", 3)):
            for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True)
                for n in range(count):
                    Image.new("RGB", (24, 20), colour).save(folder / f"{n}.png")
        words = f"--data {tmp_path}/data --workers 0 --epochs 12 --lr 1e-2 --ema 0.5 --mixup 0"
        result, _ = run(tmp_path, f"--batch-size 8 {words}")
        assert result["accuracy"] == 1

    def test_missing(self, tmp_path):
        with pytest.raises(SystemExit, match="no folders train and val"):
            run(tmp_path, f"--data {tmp_path}")
