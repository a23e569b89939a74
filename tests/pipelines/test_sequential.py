"""Sequential benchmarks: files read as they are, nothing of the future seen, ranks exact, runs that go on."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from candidate_gen.encoder import EncoderConfig
from features.history import UNDATED_TS_MS
from pipelines.cli import main
from pipelines.console import Stages
from pipelines.sequential import loss as losses
from pipelines.sequential.data import Sequences, SourceConfig, collate, load
from pipelines.sequential.loss import full_softmax, sampled_softmax
from pipelines.sequential.metrics import KS, popularity, rank_targets, summarise
from pipelines.sequential.model import NextItemConfig, NextItemModel
from pipelines.sequential.recipes import RECIPES, SequentialRecipe, sequential_recipe
from pipelines.sequential.run import run_benchmark
from pipelines.sequential.train import SequentialTrainConfig, Trainer

ROWS = [(7, 30, 5), (7, 10, 1), (9, 20, 3), (7, 20, 5), (9, 10, 3), (9, 40, 2), (7, 40, 5)]
"""(user, item, time): user 7 has three items at time 5, user 9 two at time 3."""
EXPECTED = {0: [10, 30, 20, 40], 1: [40, 20, 10]}
"""By time, and in file order where the times are equal."""


def sequences_of(lists: list[list[int]], n_items: int | None = None) -> Sequences:
    flat = np.concatenate([np.asarray(s, dtype=np.int64) for s in lists])
    return Sequences(
        start_U=np.concatenate([[0], np.cumsum([len(s) for s in lists])]),
        item_N=flat,
        ts_ms_N=np.arange(len(flat)) * 1000,
        n_items=n_items or int(flat.max()) + 1,
    )


def random_sequences(rng: np.random.Generator, users: int = 40, n_items: int = 30) -> Sequences:
    return sequences_of([rng.integers(0, n_items, rng.integers(1, 12)).tolist() for _ in range(users)], n_items)


def markov(rng: np.random.Generator, users: int = 400, n_items: int = 40) -> Sequences:
    """Nine times in ten the next item is the successor on a circle: every item is as popular as any other."""
    lists = []
    for _ in range(users):
        steps = np.where(rng.random(11) < 0.9, 1, rng.integers(0, n_items, 11))
        lists.append(((rng.integers(n_items) + np.cumsum(np.r_[0, steps])) % n_items).tolist())
    return sequences_of(lists, n_items)


class TestReading:
    def write(self, folder: Path, kind: str) -> tuple[Path, SourceConfig]:
        file = folder / f"data.{kind}"
        named = SourceConfig(user="u", item="i", order="t")
        if kind == "csv":
            file.write_text("u,i,t\n" + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS))
        elif kind == "tsv":
            file.write_text("".join(f"{u}\t{i}\t4.5\t{t}\n" for u, i, t in ROWS))
            named = SourceConfig(user="0", item="1", order="3")
        elif kind == "dat":
            file.write_text("".join(f"{u}::{i}::3::{t}\n" for u, i, t in ROWS))
            named = SourceConfig()
        elif kind == "txt":
            file.write_text("7 10 30 20 40\n9 40 20 10\n")
            named = SourceConfig(order="")
        else:
            pl.DataFrame(ROWS, schema=["u", "i", "t"], orient="row").write_parquet(file)
        return file, named

    @pytest.mark.parametrize("kind", ["csv", "tsv", "dat", "txt", "parquet"])
    def test_every_format_gives_the_same_sequences_with_equal_times_in_file_order(
        self, kind: str, tmp_path: Path
    ) -> None:
        sequences = load(*self.write(tmp_path, kind))
        items = np.array([10, 20, 30, 40])[sequences.item_N]
        found = {u: part.tolist() for u, part in enumerate(np.split(items, sequences.start_U[1:-1]))}
        assert found == EXPECTED
        assert sequences.n_items == 4

    def test_text_ids_and_ids_beyond_2_to_the_53_stay_apart(self, tmp_path: Path) -> None:
        ids = [2**53, 2**53 + 1, 2**62]
        (tmp_path / "a.csv").write_text("u,i,t\n" + "".join(f"A{k % 2},{i},{k}\n" for k, i in enumerate(ids * 2)))
        sequences = load(tmp_path / "a.csv", SourceConfig(user="u", item="i", order="t"))
        assert (sequences.n_users, sequences.n_items) == (2, 3)

    def test_where_leaves_other_rows_out_and_core_repeats_until_all_have_enough(self, tmp_path: Path) -> None:
        # Items: a in 3 rows of users 1 2 3, b in 3, c in 1. Core 2 drops c, then user 4, who has one row left.
        rows = [(1, "a"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a"), (4, "a"), (4, "c")]
        text = "u,i,t,ok\n" + "".join(f"{u},{i},{n},1\n" for n, (u, i) in enumerate(rows)) + "5,z,9,0\n" * 5
        (tmp_path / "a.csv").write_text(text)
        source = SourceConfig(user="u", item="i", order="t", where="ok=1")
        assert load(tmp_path / "a.csv", source).n_users == 4
        kept = load(tmp_path / "a.csv", replace(source, core=2))
        assert (kept.n_users, kept.n_items, len(kept.item_N)) == (3, 2, 7)

    @pytest.mark.parametrize(
        ("text", "source", "says"),
        [
            ("u,i,t\n1,2,3\n", SourceConfig(user="who", item="i", order="t"), "no column 'who'; it has u, i, t"),
            ("u,i,t\n1,2,3\n1,3,x\n", SourceConfig(user="u", item="i", order="t"), "row 2: t is 'x'"),
            ("u,i,t\n1,2,3\n1,,4\n", SourceConfig(user="u", item="i", order="t"), "1 rows without a item"),
            ("u,i,t\n1,2,3\n2,2,4\n", SourceConfig(user="u", item="i", order="t"), "no user has 3 interactions"),
            ("u,i,t\n1,2,3\n", SourceConfig(user="u", item="i", order="t", where="t=9"), "no rows where t=9"),
            ("1 2 3\n4\n", SourceConfig(order=""), "line 2: '4' has no items"),
            ("", SourceConfig(), "the first line is empty"),
        ],
    )
    def test_a_wrong_file_is_refused_with_what_was_read(
        self, text: str, source: SourceConfig, says: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match=says):
            load(tmp_path / "a.csv", source)


class TestLeaveOneOut:
    sequences = sequences_of([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])

    def pairs(self, role, length: int = 50, **options) -> list[tuple[int, int]]:
        """All (last item read, target) of the windows."""
        batch = collate(self.sequences, self.sequences.windows(role, length, **options))
        return sorted(
            zip(batch.item_BP[batch.valid_BP].tolist(), batch.target_BP[batch.valid_BP].tolist(), strict=True)
        )

    def test_the_last_two_items_of_whoever_is_evaluated_are_no_training_targets(self) -> None:
        # Users of 5, 2 and 3 items: the second is too short to be evaluated and trains with all it has.
        assert self.pairs("train") == [(0, 1), (1, 2), (5, 6)]
        assert self.pairs("refit") == [(0, 1), (1, 2), (2, 3), (5, 6), (7, 8)]

    def test_the_second_to_last_is_validated_and_the_last_is_tested(self) -> None:
        items = self.sequences.item_N
        assert items[self.sequences.windows("validation", 50).end_W].tolist() == [3, 8]
        assert items[self.sequences.windows("test", 50).end_W].tolist() == [4, 9]
        assert self.pairs("test", length=2) == [(2, 3), (3, 4), (7, 8), (8, 9)]

    def test_all_windows_have_every_training_target_once(self) -> None:
        rng = np.random.default_rng()
        self.sequences = random_sequences(rng)
        assert self.pairs("train", length=3, all_of=True) == self.pairs("train", length=50)
        assert self.sequences.windows("train", 3, all_of=True).size_W.max() == 3

    def test_padding_stands_behind_and_a_request_comes_when_the_target_was_consumed(self) -> None:
        batch = collate(self.sequences, self.sequences.windows("test", 50))
        assert batch.valid_BP.tolist() == [[True] * 4, [True, True, False, False]]
        assert batch.next_ms_BP.tolist() == [[1000, 2000, 3000, 4000], [8000, 9000, UNDATED_TS_MS, UNDATED_TS_MS]]
        assert batch.event_ms_BP[0].tolist() == [0, 1000, 2000, 3000]


class TestRanking:
    @pytest.mark.parametrize("exclude", ["seen", "window", "none"])
    def test_metrics_are_what_a_plain_loop_over_all_orders_of_ties_says(self, exclude) -> None:
        rng = np.random.default_rng()
        sequences = random_sequences(rng)
        windows = sequences.windows("test", 4)
        scores = torch.from_numpy(rng.integers(0, 12, (len(windows), 30)).astype(np.float32))  # many ties
        found = summarise(rank_targets(lambda _: scores.clone(), sequences, windows, exclude), 30)
        hr, ndcg, shown = dict.fromkeys(KS, 0.0), dict.fromkeys(KS, 0.0), set()
        for row, (begin, end, first) in enumerate(zip(windows.begin_W, windows.end_W, windows.first_W, strict=True)):
            seen = {"seen": sequences.item_N[first:end], "window": sequences.item_N[begin:end], "none": []}[exclude]
            target, s = sequences.item_N[end], scores[row].tolist()
            rivals = [s[v] for v in range(30) if v not in seen and v != target]
            above, beside = sum(r > s[target] for r in rivals), sum(r == s[target] for r in rivals)
            places = [] if target in seen else range(above + 1, above + beside + 2)
            for k in KS:
                hr[k] += sum(place <= k for place in places) / (beside + 1)
                ndcg[k] += sum(1 / math.log2(place + 1) for place in places if place <= k) / (beside + 1)
            shown |= set(range(30)) - set(seen)
        for k in KS:
            assert found[f"hr@{k}"] == pytest.approx(hr[k] / len(windows))
            assert found[f"ndcg@{k}"] == pytest.approx(ndcg[k] / len(windows))
        assert found["coverage@200"] == pytest.approx(len(shown) / 30)

    def test_popularity_counts_what_came_before_the_targets_and_nothing_after(self) -> None:
        sequences = sequences_of([[0, 0, 1, 2], [3, 3], [0, 3, 1]], 4)
        validation = popularity(sequences, sequences.windows("validation", 9))(sequences.windows("validation", 9))
        test = popularity(sequences, sequences.windows("test", 9))(sequences.windows("test", 9))
        assert validation[0].tolist() == [3, 0, 0, 2]  # 0 0 | 3 3 | 0
        assert test[0].tolist() == [3, 1, 0, 3]  # 0 0 1 | 3 3 | 0 3


class TestLosses:
    def tensors(self, n: int = 150, v: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, item = torch.randn(n, 6).double(), torch.randn(v, 6).double()
        return query.requires_grad_(), item.requires_grad_(), torch.randint(v, (n,))

    def test_the_full_softmax_is_cross_entropy_with_its_gradients_however_it_is_cut(self, monkeypatch) -> None:
        monkeypatch.setattr(losses, "CHUNK_BYTES", {"cpu": 0})  # 64 rows at a time: three chunks
        query, item, target = self.tensors()
        loss = 3 * full_softmax(query, item, target, 0.2)
        plain = 3 * torch.nn.functional.cross_entropy(query @ item.T / 0.2, target, reduction="sum")
        assert torch.allclose(loss, plain)
        found, expected = torch.autograd.grad(loss, (query, item)), torch.autograd.grad(plain, (query, item))
        assert all(torch.allclose(f, e) for f, e in zip(found, expected, strict=True))

    def test_in_bf16_the_full_softmax_is_the_same_to_a_percent(self) -> None:
        query, item, target = (t.float() if t.is_floating_point() else t for t in self.tensors())
        low, high = full_softmax(query, item, target, 1.0, bf16=True), full_softmax(query, item, target, 1.0)
        assert float(low.detach() / high.detach()) == pytest.approx(1.0, abs=0.01)
        found, expected = torch.autograd.grad(low, item)[0], torch.autograd.grad(high, item)[0]
        assert float((found - expected).norm() / expected.norm()) < 0.02

    def test_the_whole_catalogue_as_a_pool_is_the_exact_softmax(self) -> None:
        query, item, target = self.tensors()
        everything = torch.arange(40)
        found = sampled_softmax(
            query, item[target], item, target_N=target, pool_C=everything, log_draws_C=torch.zeros(40), temperature=0.2
        )
        assert torch.allclose(found, full_softmax(query, item, target, 0.2))

    def test_corrected_pools_of_uniform_and_in_batch_items_estimate_the_full_sum_without_bias(self) -> None:
        # One position, 12 items drawn as the model draws them: the mean of e^loss must meet the full softmax's.
        torch.manual_seed(0)
        share = np.random.default_rng(1).dirichlet(np.ones(12))
        config = NextItemConfig(
            encoder=EncoderConfig(dim=4, layers=1), loss="sampled", uniform_negatives=16, in_batch_negatives=32
        )
        model = NextItemModel(config, 12, share)
        targets = torch.from_numpy(np.random.default_rng(2).choice(12, 20_000, p=share))
        query, item = torch.randn(1, 4), torch.randn(12, 4)
        logits = (query @ item.T)[0]
        full = float((logits.exp().sum() / logits[5].exp()).double())
        estimates = []
        for _ in range(1500):
            pool = model._pool(targets)
            drawn = sampled_softmax(
                query,
                item[[5]],
                item[pool],
                target_N=torch.tensor([5]),
                pool_C=pool,
                log_draws_C=model.log_draws_V[pool],
                temperature=1.0,
            )
            estimates.append(float(drawn.exp()))
        assert np.mean(estimates) / full == pytest.approx(1.0, abs=0.03)


def small(kind: str = "ligr", **model) -> SequentialRecipe:
    encoder = EncoderConfig(kind=kind, dim=16, layers=1, heads=2, dropout=0.0)  # pyright: ignore[reportArgumentType]
    return SequentialRecipe(
        name="small",
        model=NextItemConfig(**{"encoder": encoder, "length": 12, "input_dropout": 0.0, "temperature": 0.1, **model}),
        train=SequentialTrainConfig(epochs=10, batch_size=32, lr=5e-3, warmup_steps=5, precision="fp32"),
    )


def trainer(sequences: Sequences, recipe: SequentialRecipe, folder: Path) -> Trainer:
    return Trainer(sequences, recipe.model, recipe.train, exclude="none", folder=folder, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("ligr", {}),
        ("hstu", {"loss": "sampled", "uniform_negatives": 24, "in_batch_negatives": 8}),
        ("sasrec", {"l2_norm": False, "temperature": 1.0}),
        ("hstu", {"times": "request"}),
    ],
)
def test_a_model_learns_who_follows_whom_where_popularity_knows_nothing(kind: str, model: dict, tmp_path: Path) -> None:
    # The successor is right nine times in ten; popularity finds 10 of 40 items at best by chance.
    sequences = markov(np.random.default_rng())
    run = trainer(sequences, small(kind, **model), tmp_path)
    run.fit()
    test = run.evaluate("test")
    assert test["ndcg@10"] > 0.8
    assert test["hr@10"] > 0.85
    windows = sequences.windows("test", 12)
    assert summarise(rank_targets(popularity(sequences, windows), sequences, windows, "none"), 40)["hr@10"] < 0.45


class TestRuns:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        sequences = markov(np.random.default_rng(5), users=120)
        users = np.repeat(np.arange(sequences.n_users), np.diff(sequences.start_U))
        frame = pl.DataFrame({"user_id": users, "item_id": sequences.item_N, "timestamp": sequences.ts_ms_N})
        frame.write_csv(tmp_path / "data.csv")
        return tmp_path / "data.csv"

    def test_a_killed_run_goes_on_as_if_nothing_had_happened(self, tmp_path: Path) -> None:
        sequences, recipe = markov(np.random.default_rng(), users=100), small("hstu")
        whole = trainer(sequences, replace(recipe, train=replace(recipe.train, epochs=4)), tmp_path / "whole")
        whole.fit()
        first = trainer(sequences, replace(recipe, train=replace(recipe.train, epochs=2)), tmp_path / "cut")
        first.fit()
        (tmp_path / "cut" / "epoch-0002.safetensors").write_bytes(b"half a checkpoint")  # killed while writing
        second = trainer(sequences, replace(recipe, train=replace(recipe.train, epochs=4)), tmp_path / "cut")
        second.fit()
        assert [e.train_loss for e in second.epochs] == pytest.approx([e.train_loss for e in whole.epochs])
        for name, parameter in whole.model.state_dict().items():
            assert torch.allclose(second.model.state_dict()[name], parameter), name
        assert len(list((tmp_path / "cut").glob("*.safetensors"))) <= 2

    def test_seeds_are_summed_up_and_a_second_call_trains_nothing(self, file: Path, tmp_path: Path) -> None:
        recipe = replace(small(), train=replace(small().train, epochs=2), refit=True)
        result = run_benchmark(file, recipe, tmp_path / "run", Stages(), seeds=2)
        values = [run["test"]["ndcg@10"] for run in result["seeds"]]
        assert values[0] != values[1]
        assert result["summary"]["test"]["ndcg@10"]["mean"] == pytest.approx(sum(values) / 2)
        assert result["summary"]["test"]["ndcg@10"]["sd"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
        assert json.loads((tmp_path / "run" / "result.json").read_text())["data"]["users"] == 120
        stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
        again = run_benchmark(file, recipe, tmp_path / "run", Stages(), seeds=2)
        assert again["summary"] == result["summary"]
        assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}

    def test_another_recipe_or_other_data_is_refused_in_the_same_folder(self, file: Path, tmp_path: Path) -> None:
        recipe = replace(small(), train=replace(small().train, epochs=1))
        first = run_benchmark(file, recipe, tmp_path / "run", Stages(), score_test=False)
        assert "test" not in first["seeds"][0]
        other = replace(recipe, exclude="none")
        with pytest.raises(ValueError, match="another recipe or other data"):
            run_benchmark(file, other, tmp_path / "run", Stages(), score_test=False)
        assert run_benchmark(file, other, tmp_path / "run", Stages(), fresh=True)["recipe"]["exclude"] == "none"

    def test_the_command_prints_a_table_writes_json_and_refuses_what_does_not_exist(
        self, file: Path, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        command = ["reelrank", "sequential", "--data", str(file), "--run", str(tmp_path / "run")]
        sets = ["train.epochs=1", "model.encoder.dim=8", "model.encoder.kind=hstu", "model.length=12"]
        changes = [word for s in sets for word in ("--set", s)]
        monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "out.json"), *changes])
        with pytest.raises(SystemExit, match="0"):
            main()
        shown = capsys.readouterr().out
        assert "popularity" in shown
        assert "eSASRec (published)" in shown
        assert json.loads((tmp_path / "out.json").read_text())["recipe"]["model"]["encoder"]["kind"] == "hstu"
        monkeypatch.setattr(sys, "argv", [*command, "--set", "model.encoder.kind=gru"])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert "choose from ligr, hstu, sasrec" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built_and_changed(name: str) -> None:
    chosen = sequential_recipe(name, ("model.times=none", "train.epochs=3"), user="7", order="")
    assert (chosen.train.epochs, chosen.source.user, chosen.source.order) == (3, "7", "")
    with pytest.raises(ValueError, match="no sequential recipe"):
        sequential_recipe(name + "-x")
