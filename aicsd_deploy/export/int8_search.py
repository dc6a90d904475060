"""INT8 within an allowed loss: calibration methods tried, costly layers found and left in float, the rest proved on val."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from aicsd_deploy.console import percent, progress, say
from aicsd_deploy.data.dataset import SegmentationDataset, Subset, evenly_spread
from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.export.quantize import Quantizer, Target
from aicsd_deploy.export.verify import compare, frames_for_comparison
from aicsd_deploy.metrics import Scores
from aicsd_deploy.runtime.base import Backend, open_backend

COMPARED_FRAMES = 8


@dataclass(frozen=True)
class Int8Result:
    """What was tried and what came of it; mIoU in fractions, 0 to 1.

    Attributes:
        float_scores, int8_scores: on the validation images.
        method: the calibration method that was kept.
        methods: method → mIoU on training images that calibration did not see.
        layer_costs: layer → share of pixels that change their label when this layer is quantised besides the chains between
            the layers; empty unless the search was needed.
        float_layers: layers left in float32.
    """

    float_scores: Scores
    int8_scores: Scores
    method: str
    methods: dict[str, float] = field(default_factory=dict)
    layer_costs: dict[str, float] = field(default_factory=dict)
    float_layers: list[str] = field(default_factory=list)

    @property
    def drop(self) -> float:
        """mIoU lost on the validation images, over the classes that their labels have."""
        return self.float_scores.labelled_miou - self.int8_scores.labelled_miou


def quantize_within(
    source: Path,
    out: Path,
    *,
    target: Target,
    train: SegmentationDataset,
    val: SegmentationDataset,
    frames: int,
    methods: Sequence[str],
    keep_float: Sequence[str] = (),
    max_miou_drop: float,
) -> Int8Result:
    """Write an INT8 form of a float file that loses no more mIoU than allowed.

    Methods are compared on training images, so that the validation images judge a choice they did not make.

    Args:
        source: the float32 file.
        out: where the result goes; the last thing tried stands there, so give a temporary path.
        target: what the result is for.
        train: its images calibrate and choose.
        val: its images prove.
        frames: how many images calibrate; as many others choose.
        methods: calibration methods to try.
        keep_float: of "first" and "last", the layers to leave in float anyway.
        max_miou_drop: mIoU that may be lost, as a fraction.

    Raises:
        InputError: with `keep_float`, nothing is left to quantise.
        VerificationError: it loses more even with half of its layers in float.
    """
    calibration, held_out = _calibration_and_others(train, frames)
    images = frames_for_comparison(calibration, count=len(calibration))
    with closing(Quantizer(source, images, target=target)) as quantizer:
        with open_backend(source, device="cpu") as backend:
            float_scores = _scores(backend, val, "scoring the float file")
        kept = [quantizer.layers[{"first": 0, "last": -1}[name]] for name in keep_float]
        if not set(quantizer.layers) - set(kept):
            raise InputError(
                f"--keep-float {' '.join(keep_float)} leaves every layer of {source} in float (it has "
                f"{len(quantizer.layers)}), so that nothing would be INT8. Keep fewer, or use the float32 file as it is."
            )
        search = _Search(quantizer, out, held_out, val, float_scores, kept, max_miou_drop)
        result = search.try_methods(methods)
        if result.drop > max_miou_drop:
            say(f"{_change(result.drop)}, {100 * max_miou_drop:.2f} may be lost: looking for costly layers")
            result = search.leave_layers_in_float(result)
    if result.drop > max_miou_drop:
        raise VerificationError(
            f"INT8 loses {100 * result.drop:.2f} points of mIoU ({percent(float_scores.labelled_miou)} to "
            f"{percent(result.int8_scores.labelled_miou)} %), at most {100 * max_miou_drop:.2f} are allowed, with "
            f"{len(result.float_layers)} of {len(quantizer.layers)} layers left in float. It was not kept. Raise "
            "--max-miou-drop if you can afford it, or give more --frames."
        )
    return result


@dataclass(frozen=True)
class _Search:
    """Writes one INT8 form after the other to `out` and scores it there.

    Attributes:
        quantizer, out, val, float_scores, max_miou_drop: see `quantize_within`.
        held_out: training images that calibration did not see.
        kept: layers that stay in float anyway.
    """

    quantizer: Quantizer
    out: Path
    held_out: SegmentationDataset
    val: SegmentationDataset
    float_scores: Scores
    kept: list[str]
    max_miou_drop: float

    def try_methods(self, methods: Sequence[str]) -> Int8Result:
        """Return what the first calibration method within the limit gives, else the best; the best on training images go first."""
        on_training_images = {}
        for method in methods if len(methods) > 1 else ():
            miou = self._attempt(self.held_out, method, self.kept, f"trying {method}").labelled_miou
            say(f"{method}: {percent(miou)} % mIoU on {len(self.held_out)} training images")
            on_training_images[method] = miou
        results = []
        # The methods differ by little, so that the next one is tried before a layer is given up.
        for method in sorted(methods, key=lambda name: -on_training_images.get(name, 0.0)):
            scores = self._attempt(self.val, method, self.kept, f"proving {method}")
            result = Int8Result(self.float_scores, scores, method, on_training_images, float_layers=self.kept)
            say(f"{method}: {_change(result.drop)} on the validation images")
            results.append(result)
            if result.drop <= self.max_miou_drop:
                break
        return max(results, key=lambda result: result.int8_scores.labelled_miou)

    def leave_layers_in_float(self, result: Int8Result) -> Int8Result:
        """Leave 1, 2, 4, … of the costliest layers in float, half of all at most, until the limit holds."""
        costs = _layer_costs(self.quantizer, self.held_out, result.method)
        result = replace(result, layer_costs=costs)
        ranked = sorted((name for name in costs if name not in self.kept), key=lambda name: -costs[name])
        half = len(ranked) // 2
        for count in sorted({*(2**i for i in range(half.bit_length())), half} - {0}):
            layers = [*self.kept, *ranked[:count]]
            scores = self._attempt(self.val, result.method, layers, f"proving, {count} layers in float")
            result = replace(result, int8_scores=scores, float_layers=layers)
            say(f"{count} layers in float: {_change(result.drop)}")
            if result.drop <= self.max_miou_drop:
                break
        return result

    def _attempt(self, dataset: SegmentationDataset, method: str, layers: Sequence[str], title: str) -> Scores:
        notes = {"int8_float_layers": " ".join(layers)}
        self.quantizer.write(self.out, method=method, float_layers=layers, notes=notes)
        with open_backend(self.out, device="cpu") as candidate:
            return _scores(candidate, dataset, title)


def _calibration_and_others(train: SegmentationDataset, frames: int) -> tuple[Subset, Subset]:
    """Return `frames` images, evenly spread, and as many others, which are the same ones only where there are no others."""
    calibration = evenly_spread(len(train), frames)
    others = [i for i in range(len(train)) if i not in set(calibration)] or list(range(len(train)))
    return Subset(train, calibration), Subset(train, [others[i] for i in evenly_spread(len(others), frames)])


def _change(drop: float) -> str:
    return f"{'gains' if drop < 0 else 'loses'} {100 * abs(drop):.2f} points of mIoU"


def _scores(backend: Backend, dataset: SegmentationDataset, title: str) -> Scores:
    return evaluate(backend, dataset, title=title).scores(backend.metadata.class_names)


def _layer_costs(quantizer: Quantizer, dataset: SegmentationDataset, method: str) -> dict[str, float]:
    """Return, for each layer, the share of pixels whose label changes when it is the only one that is quantised."""
    frames = frames_for_comparison(dataset, count=COMPARED_FRAMES)
    costs = {}
    with tempfile.TemporaryDirectory(prefix="aicsd.int8.") as folder:
        none, one = Path(folder) / "none.onnx", Path(folder) / "one.onnx"
        quantizer.write(none, method=method, float_layers=quantizer.layers, notes={})
        with open_backend(none, device="cpu") as reference, progress("layers", len(quantizer.layers)) as advance:
            for layer in quantizer.layers:
                others = [name for name in quantizer.layers if name != layer]
                quantizer.write(one, method=method, float_layers=others, notes={})
                with open_backend(one, device="cpu") as candidate:
                    costs[layer] = 1 - compare(reference, candidate, frames).share
                advance(layer)
    return costs
