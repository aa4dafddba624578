"""The benchmarks run and their counts are right; times are never tested."""

import json
from dataclasses import replace

import pytest
from conftest import tiny_run

import bench
import train
from configs import as_ar


def rows(capsys, *args):
    bench.main([*map(str, args), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_sampling_counts_calls_and_head_rows(checkpoint, capsys):
    by_name = {
        r["sampler"]: r
        for r in rows(capsys, "sample", checkpoint, "--steps", 50, "--batch_size", 4, "--repeats", 1)
    }
    assert by_name.keys() == bench.SAMPLERS.keys()
    assert by_name["ddpm"]["times_faster"] == 1 and by_name["ddpm"]["calls"] <= 50
    for name in ("ddpm_cache", "first_hitting"):
        assert by_name[name]["calls"] <= 32 and by_name[name]["head_rows"] == 4 * 32
    assert by_name["ddpm"]["head_rows"] > 10 * 4 * 32


def test_semi_ar_counts_the_calls_of_its_windows(checkpoint, capsys):
    batch, alone, *strides = rows(
        capsys, "semi_ar", checkpoint, "--samplers", "first_hitting", "--repeats", 1
    )
    assert batch["calls"] == 32 and alone["calls"] == 16 * 32  # a call per token, or per token of all rows
    assert [r["how"].split()[-1] for r in strides] == ["8", "16", "24", "31"]
    assert all(r["calls"] == 16 * 32 == r["tokens"] for r in strides)  # each token is revealed once


def test_ar_models_are_measured_with_their_own_sampler(corpus, tmp_path, capsys):
    cfg = replace(as_ar(tiny_run(corpus)), bos=True, samples=0, out_dir=str(tmp_path / "ar"))
    train.main(cfg)
    capsys.readouterr()
    (row,) = rows(capsys, "sample", cfg.out_dir, "--repeats", 1, "--batch_size", 2)
    assert row["sampler"] == "ar" and row["calls"] == 31
    assert len(rows(capsys, "semi_ar", cfg.out_dir, "--repeats", 1)) == 6
    for args, words in (
        (["sample", cfg.out_dir, "--samplers", "ddpm"], "--sampler ddpm"),
        (["semi_ar", cfg.out_dir, "--samplers", "ar", "ddpm"], "takes one"),
        (["evaluate", cfg.out_dir], "loss=ar"),
    ):
        with pytest.raises(SystemExit) as e:
            bench.main(args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count("\n") == 1


def test_estimators_agree_and_are_ranked(checkpoint, capsys):
    got = rows(capsys, "evaluate", checkpoint, "--repeats", 6)
    iid, mdlm, ours, reported = got
    for other in (iid, mdlm):
        assert abs(other["bits_per_char"] - ours["bits_per_char"]) < 4 * (iid["std"] + reported["std"])
    assert ours["forwards_for_equal_error"] == 1 < iid["forwards_for_equal_error"]


def test_bad_arguments(checkpoint, capsys):
    for args in (
        ["sing", checkpoint],
        ["sample", checkpoint, "--steps", "0"],
        ["evaluate", checkpoint, "--repeats", "1"],
    ):
        with pytest.raises(SystemExit) as e:
            bench.main([*map(str, args)])
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    bench.main(["sample", str(checkpoint), "--steps", "4", "--repeats", "1"])
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["sampler", "seconds"]
