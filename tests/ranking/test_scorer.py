"""The frozen scorer: the trained model's answers, from coded tables, together or alone, by whichever engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from features.batch import to_batch
from features.inputs import Inputs
from ranking.calibrate import Calibration
from ranking.compiled import (
    best_dense_type,
    compile_package,
    load_engine,
)
from ranking.config import RankerConfig, RankerSizes, config_fields
from ranking.freeze import freeze
from ranking.infer import Engine, Ranker
from ranking.model import RankerModel
from ranking.requests import random_requests, together
from ranking.watch import WatchQuantiles

SIZES = RankerSizes(
    user_names=("user_id", "region"),
    user_table_rows=(500, 12),
    video_names=("video_id", "author_id", "tags"),
    video_table_rows=(900, 60, 30),
    user_dense=9,
    video_dense=5,
    candidate_dense=17,
    surface_rows=4,
    slot_rows=12,
    tasks=("click", "long_view", "like"),
)
SMALL = RankerConfig(
    embedding_dim=8,
    bottom_widths=(16, 8),
    cross_rank=8,
    attention_width=8,
    expert_widths=(16, 8),
    n_experts=3,
    embedding_init=0.5,
)
CONFIGS = {
    "the default": SMALL,
    "no history": replace(SMALL, history=False),
    "surface as context": replace(SMALL, surface_as_context=True),
    "no counters": replace(SMALL, counters=False),
    "one layer of each": replace(SMALL, bottom_widths=(8,), cross_layers=1, n_experts=1),
    "three layers, four heads": replace(SMALL, bottom_widths=(16, 8, 8), cross_layers=3, attention_heads=4),
}


def exported(folder: Path, config: RankerConfig = SMALL, seed: int = 0) -> RankerModel:
    """A model of random weights, and what training would have exported of it."""
    torch.manual_seed(seed)
    model = RankerModel(config, SIZES, dict.fromkeys(SIZES.tasks, 0.2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, biases and sharpness, which start where mistakes would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.direct.weight.normal_(std=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "ranker.safetensors")
    watch = WatchQuantiles.fit(np.arange(1_000.0), np.full(1_000, 9_000.0), None)
    description = {
        "config": config_fields(config),
        "sizes": asdict(SIZES),
        "base_rates": dict.fromkeys(SIZES.tasks, 0.2),
        "watch_quantiles": watch.to_json(),
    }
    (folder / "ranker.json").write_text(json.dumps(description))
    Calibration.identity(SIZES.tasks).save(folder / "calibration.json")
    return model


def asked(*candidates: int, seed: int = 0, config: RankerConfig = SMALL) -> Inputs:
    return random_requests(SIZES, candidates, seed=seed, history_length=20 if config.history else 0)


def of_model(model: RankerModel, inputs: Inputs) -> np.ndarray:
    with torch.no_grad():
        logits_NT, watch_N = model.logits(to_batch(inputs))
    return np.concatenate([logits_NT.numpy(), watch_N.numpy()[:, None]], axis=1)


def of_ranker(ranker: Ranker, inputs: Inputs) -> np.ndarray:
    logits_NT, watch_N = ranker.logits(inputs)
    return np.concatenate([logits_NT, watch_N[:, None]], axis=1)


def strange(inputs: Inputs) -> Inputs:
    """Absent slots everywhere: a user and videos of whom nothing is known, and a history of nothing."""
    return replace(
        inputs,
        user_sparse_BW=np.full_like(inputs.user_sparse_BW, -1),
        video_sparse_UW=np.full_like(inputs.video_sparse_UW, -1),
        history_length_B=np.zeros_like(inputs.history_length_B),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_frozen_ranker_answers_as_the_trained_model(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = exported(tmp_path, config)
    ranker = Ranker.load(tmp_path)
    for inputs in (asked(40, config=config), asked(1, 30, 7, config=config), strange(asked(5, 2, config=config))):
        np.testing.assert_allclose(of_ranker(ranker, inputs), of_model(model, inputs), atol=2e-5)


def test_requests_computed_together_answer_as_each_alone(tmp_path: Path) -> None:
    exported(tmp_path)
    ranker = Ranker.load(tmp_path)
    requests = [asked(n, seed=n) for n in (1, 300, 25)]
    for alone, shared in zip(map(ranker.score, requests), ranker.score_together(requests), strict=True):
        np.testing.assert_allclose(shared.probability_NT, alone.probability_NT, atol=1e-6)
        np.testing.assert_allclose(shared.watch_ms_N, alone.watch_ms_N, rtol=1e-5)


def test_candidates_without_an_order_keep_their_places(tmp_path: Path) -> None:
    exported(tmp_path)
    ranker, inputs = Ranker.load(tmp_path), asked(30, 12)
    shuffled = np.random.default_rng(0).permutation(42)
    mixed = replace(
        inputs,
        owner_N=inputs.owner_N[shuffled],
        candidate_N=inputs.candidate_N[shuffled],
        candidate_dense_NC=inputs.candidate_dense_NC[shuffled],
    )
    np.testing.assert_allclose(of_ranker(ranker, mixed), of_ranker(ranker, inputs)[shuffled], atol=1e-6)


def test_one_and_two_thousand_candidates_and_strangers_get_finite_scores(tmp_path: Path) -> None:
    exported(tmp_path)
    ranker = Ranker.load(tmp_path)
    for inputs in (asked(1), asked(2_000), strange(asked(2_000)), strange(asked(1))):
        scores = ranker.score(inputs)
        assert np.isfinite(scores.probability_NT).all()
        assert ((scores.probability_NT > 0) & (scores.probability_NT < 1)).all()
        assert np.isfinite(scores.watch_ms_N).all()
    assert ranker.score(asked(0)).probability_NT.shape == (0, 3)


def test_an_id_beyond_its_table_is_named(tmp_path: Path) -> None:
    exported(tmp_path)
    inputs = asked(10)
    beyond = inputs.video_sparse_UW.copy()
    beyond[3, 1] = 60
    with pytest.raises(ValueError, match=r"video feature 'author_id' is row 60 at 3; its table has 60 rows"):
        Ranker.load(tmp_path).score(replace(inputs, video_sparse_UW=beyond))


def test_features_of_another_encoder_are_refused(tmp_path: Path) -> None:
    exported(tmp_path)
    inputs = asked(10)
    other = replace(inputs.video_columns, table_rows=(900, 61, 30))
    with pytest.raises(ValueError, match="'author_id' was encoded for 61 rows, the ranker's table has 60"):
        Ranker.load(tmp_path).score(replace(inputs, video_columns=other))


@pytest.mark.parametrize(("precision", "smaller", "off"), [("int8", 32 / 12, 0.05), ("int4", 32 / 8, 0.8)])
def test_freezing_makes_tables_smaller_and_answers_nearly_the_same(
    precision: str, smaller: float, off: float, tmp_path: Path
) -> None:
    exported(tmp_path / "trained")
    made = freeze(tmp_path / "trained", tmp_path / "frozen", precision)  # pyright: ignore[reportArgumentType]
    assert made.times_smaller == pytest.approx(smaller)
    assert made.bytes_after == sum((500, 12, 900, 60, 30)) * 32 / smaller
    inputs = asked(200)
    exact, coded = (of_ranker(Ranker.load(tmp_path / name), inputs) for name in ("trained", "frozen"))
    assert 0 < np.abs(exact - coded).max() < off
    with pytest.raises(ValueError, match="is frozen already"):
        freeze(tmp_path / "frozen", tmp_path / "again", "int8")


def test_freezing_in_fp32_changes_nothing(tmp_path: Path) -> None:
    exported(tmp_path / "trained")
    freeze(tmp_path / "trained", tmp_path / "frozen", "fp32")
    inputs = asked(50)
    exact, coded = (of_ranker(Ranker.load(tmp_path / name), inputs) for name in ("trained", "frozen"))
    np.testing.assert_array_equal(exact, coded)


def test_an_engine_that_answers_differently_is_not_used(tmp_path: Path) -> None:
    exported(tmp_path)
    ranker, inputs = Ranker.load(tmp_path), asked(20)
    before = of_ranker(ranker, inputs)
    for wrong in (0.01, float("nan")):
        broken = Engine("broken", lambda inputs, places, by=wrong: ranker.plain.run(inputs, places) + by, 1e-3)
        with pytest.raises(ArithmeticError, match="the broken scorer differs from the plain one"):
            ranker.accelerate(broken)
    alone = Engine("alone", lambda inputs, places: ranker.plain.run(inputs, places) + (places.shape[0] == 1), 1e-3)
    with pytest.raises(ArithmeticError, match=r"for requests of \(300,\) candidates"):  # as a server asks
        ranker.accelerate(alone)
    assert ranker.engine == "plain fp32"
    np.testing.assert_array_equal(of_ranker(ranker, inputs), before)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of a ranker, folder with its compiled code)."""
    folder, cache = tmp_path_factory.mktemp("ranker"), tmp_path_factory.mktemp("scorers")
    cache.chmod(0o700)
    exported(folder)
    compile_package(Ranker.load(folder), best_dense_type(), cache)
    return folder, cache


def accelerated(folder: Path, cache: Path) -> Ranker:
    ranker = Ranker.load(folder)
    engine = load_engine(ranker, best_dense_type(), cache)
    assert engine is not None
    ranker.accelerate(engine)
    return ranker


def test_compiled_code_answers_as_the_trained_model(compiled: tuple[Path, Path]) -> None:
    folder, cache = compiled
    ranker, plain = accelerated(folder, cache), Ranker.load(folder)
    assert ranker.engine == f"compiled {best_dense_type()}"
    for inputs in (asked(1), asked(2_000), asked(64, 3, 500), strange(asked(1)), strange(asked(9, 1))):
        expected, found = of_ranker(plain, inputs), of_ranker(ranker, inputs)
        assert (np.abs(found - expected) <= 0.05 * (1 + np.abs(expected))).all()


def test_compiled_code_serves_another_model_of_the_same_shape(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    _, cache = compiled
    exported(tmp_path, seed=5)
    ranker, inputs = accelerated(tmp_path, cache), asked(100)
    expected = of_ranker(Ranker.load(tmp_path), inputs)
    assert (np.abs(of_ranker(ranker, inputs) - expected) <= 0.05 * (1 + np.abs(expected))).all()


def test_threads_score_side_by_side(compiled: tuple[Path, Path]) -> None:
    ranker = accelerated(*compiled)
    requests = [asked(n, seed=n) for n in range(1, 200, 10)]
    expected, found = [of_ranker(ranker, inputs) for inputs in requests], {}

    def score(start: int) -> None:
        for n in range(start, len(requests), 4):
            found[n] = of_ranker(ranker, requests[n])

    threads = [threading.Thread(target=score, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, answer in enumerate(expected):
        np.testing.assert_array_equal(found[n], answer)


def test_a_candidate_scores_the_same_whoever_shares_its_batch(compiled: tuple[Path, Path]) -> None:
    ranker, inputs = accelerated(*compiled), asked(400)
    crowd = of_ranker(ranker, together([asked(37, seed=9), inputs, asked(5, seed=8)]))[37:437]
    assert np.abs(crowd - of_ranker(ranker, inputs)).max() < 1e-2  # bf16 rounds otherwise in another block


def test_a_shape_that_was_not_compiled_has_no_engine(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    _, cache = compiled
    exported(tmp_path, replace(SMALL, n_experts=2))
    assert load_engine(Ranker.load(tmp_path), best_dense_type(), cache) is None


def test_code_that_others_could_have_written_is_not_loaded(compiled: tuple[Path, Path]) -> None:
    folder, cache = compiled
    cache.chmod(0o770)
    try:
        with pytest.raises(PermissionError, match="chmod 700"):
            load_engine(Ranker.load(folder), best_dense_type(), cache)
    finally:
        cache.chmod(0o700)


def test_scoring_needs_neither_torchrec_nor_fbgemm(tmp_path: Path) -> None:
    """As on a machine with torch alone."""
    exported(tmp_path)
    expected = of_ranker(Ranker.load(tmp_path), asked(40))
    program = f"""
import sys
from pathlib import Path
sys.modules["torchrec"] = sys.modules["fbgemm_gpu"] = None
import numpy as np
from ranking.device import device_engine
from ranking.infer import Ranker
from ranking.requests import random_requests
ranker = Ranker.load(Path({str(tmp_path)!r}))
inputs = random_requests(ranker.sizes, (40,), seed=0, history_length=20)
print(np.concatenate([ranker.logits(inputs)[0].ravel(), ranker.logits(inputs)[1]]).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(done.stdout))
    np.testing.assert_allclose(found, np.concatenate([expected[:, :-1].ravel(), expected[:, -1]]), atol=1e-6)
