"""examples/compare_vit.py makes all trainings, on all GPUs, and plot_vit.py draws their curves."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare_vit
import plot_vit
import settled
import train_vit
from test_train_vit import TINY


class TestComparison:
    def test_all_trainings_and_their_curves(self, tmp_path, monkeypatch):
        # In this process: others would load everything again.
        monkeypatch.setattr(
            compare_vit,
            "run_all",
            lambda trainings, *_: [train_vit.main(words) for words in trainings],
        )
        words = f"--attentions softmax mlla --seeds 0 1 --finetune 1 --output {tmp_path}"
        results = compare_vit.main(f"{words} --epochs 1 {TINY}".split())
        assert results == json.loads((tmp_path / "results.json").read_text())
        for stage in ("scratch", "finetune"):
            runs, rows = results[stage]["runs"], results[stage]["summary"]
            assert [(r["attention"], r["seed"]) for r in runs] == [
                ("softmax", 0), ("mlla", 0), ("softmax", 1), ("mlla", 1)
            ]  # fmt: skip
            accuracies = [100 * r["accuracy"] for r in runs if r["attention"] == "mlla"]
            assert rows["mlla"]["mean"] == pytest.approx(sum(accuracies) / 2, abs=1e-3)
            assert rows["softmax"]["from_softmax"] == 0
        plot_vit.main([str(tmp_path / "results.json"), "--output", str(tmp_path / "curves.png")])
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.size[0] > 500

    def test_fine_tuning_needs_only_softmax_from_nothing(self, tmp_path, monkeypatch, capsys):
        def run_all(trainings, *_):
            for words in trainings:
                result = dict.fromkeys(compare_vit.KEPT, 0) | {"settings": {}}
                result["attention"] = words[words.index("--attention") + 1]
                folder = compare_vit.folder_of(words)
                folder.mkdir()
                (folder / "result.json").write_text(json.dumps(result))

        monkeypatch.setattr(compare_vit, "run_all", run_all)
        words = f"--attentions softmax mlla --seeds 0 --finetune 1 --output {tmp_path}".split()
        results = compare_vit.main([*words, "--scratch", "softmax"])
        assert list(results["scratch"]["summary"]) == ["softmax"]
        assert list(results["finetune"]["summary"]) == ["softmax", "mlla"]
        for scratch, message in (("mlla", "starts from softmax"), ("softmax rala", "not among")):
            with pytest.raises(SystemExit):
                compare_vit.main([*words, "--scratch", *scratch.split()])
            assert message in capsys.readouterr().err

    def test_what_is_done_is_not_repeated_and_a_failure_ends_it(self, tmp_path):
        words = f"{TINY} --attention softmax --epochs 1 --output {tmp_path}"
        training, failing = f"{words}/one".split(), f"{words}/two --batch-size 64".split()
        with pytest.raises(SystemExit, match=r"two failed: .*fewer training pictures"):
            compare_vit.run_all([training, failing], ThreadPoolExecutor(1), "test")
        assert "100%" in (tmp_path / "one" / "log.txt").read_text()
        done = (tmp_path / "one" / "result.json").stat().st_mtime_ns
        compare_vit.run_all([training], ThreadPoolExecutor(1), "test")
        assert (tmp_path / "one" / "result.json").stat().st_mtime_ns == done

    def test_summary(self):
        runs = [
            {"attention": name, "accuracy": value}
            for name, value in (("softmax", 0.9), ("softmax", 0.92), ("rala", 0.93))
        ]
        rows = compare_vit.summary(runs)
        assert rows["softmax"] == {
            "mean": 91.0, "deviation": 1.414, "seeds": [90.0, 92.0], "from_softmax": 0.0
        }  # fmt: skip
        assert rows["rala"]["from_softmax"] == 2.0
        assert "| rala | 93.00 | 93.00 | +2.00 |" in compare_vit.table("scratch", rows)


class TestGPUs:
    @pytest.mark.parametrize(
        ("named", "count", "expected"),
        [
            (None, 2, ["0", "1"]),
            ("2,5", 2, ["2", "5"]),
            # CUDA sees nothing behind the first that is not there.
            ("GPU-a,-1,3", 1, ["GPU-a"]),
            ("", 0, []),
        ],
    )
    def test_names(self, monkeypatch, named, count, expected):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if named is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert compare_vit.gpus() == expected

    def test_each_process_has_its_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr(compare_vit, "gpus", lambda: ["3", "7"])
        with compare_vit.processes(1) as pool:
            found = [pool.submit(settled.gpu, tmp_path, 2) for _ in range(2)]
        assert sorted(future.result() for future in found) == ["3", "7"]

    def test_each_has_as_many_places(self, monkeypatch):
        monkeypatch.setattr(compare_vit, "gpus", lambda: ["3", "7"])
        monkeypatch.setattr(compare_vit, "ProcessPoolExecutor", lambda *given: given)
        count, _, settle, (places, _) = compare_vit.processes(2)
        assert settle is compare_vit.settle
        assert [places.get(timeout=5) for _ in range(count)] == ["3", "7", "3", "7"]
