"""Damaged, hostile and outdated files: one line, and no changed number. The long attacks are in
tests/attack.py."""

import io
import json
import random
import shutil
import struct
import tarfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import attack
import pytest
import torch
from conftest import CHARACTERS, refused, save, tiny_run

import data.corpus as corpus
import data.prepare as prepare
import evaluate
import sample
import train
from common import UserError
from configs import from_dict
from data.checkpoints import load, read_checkpoint, read_record, write_record
from data.command_line import from_cli
from data.corpus import read_meta, read_split
from data.json_files import check_fields, read_json
from data.runs import is_finished, read_log
from data.shards import begin_or_resume, is_complete
from data.texts import unzip_text8
from data.tokenizer import tokenizer_of
from tasks import convert

# --------------------------------------------------------------------------------------------------
# Short versions of the attacks


@pytest.fixture
def rng():
    return random.Random(0)


def test_killed_runs_equal_the_one_that_nobody_killed(rng, tmp_path):
    count = attack.attack_runs(4, rng, tmp_path)
    assert count["kills"] >= 4 and count["runs"] and not attack.is_broken(count), count


def test_damaged_files_never_change_a_number(rng, tmp_path):
    table = attack.attack_checkpoints(24, rng, tmp_path) | attack.attack_data(21, rng, tmp_path)
    assert sum(count["refused"] for count in table.values()) > 35
    assert not any(map(attack.is_broken, table.values())), table


def test_random_command_lines_have_no_traceback(rng, tmp_path, monkeypatch):
    quick = {name: attack.SCRIPTS[name] for name in ("train", "sample", "data.prepare")}
    monkeypatch.setattr(attack, "SCRIPTS", quick)
    table = attack.attack_lines(12, rng, tmp_path)
    assert sum(count["refused"] for count in table.values()) > 3
    assert not any(map(attack.is_broken, table.values())), table
    assert attack.run_line("builtins", "int", ["x"], tmp_path).startswith("traceback: ")


# --------------------------------------------------------------------------------------------------
# Prepared data


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "copy")


def change(path, at=-2):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_changed_file_is_refused_and_hashed_once(copy, capsys, monkeypatch):
    cfg, calls, real = tiny_run(copy), [], corpus.hashlib.file_digest
    note = lambda *args: calls.append(1) or real(*args)
    monkeypatch.setattr(corpus.hashlib, "file_digest", note)
    for _ in range(3):
        read_split(str(copy), "train", cfg)
    assert len(calls) == 1
    change(copy / "train.bin")
    refused(capsys, lambda: read_split(str(copy), "train", cfg), "train.bin", "sha256", "prepare")


def test_large_files_are_hashed_by_verify_only(copy, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "HASHED", 10)
    prepare.main(["verify", str(copy)])
    assert capsys.readouterr().out.count("sha256 as in meta.json") == 3
    change(copy / "val.bin")
    read_split(str(copy), "val", tiny_run(copy))
    refused(capsys, lambda: prepare.main(["verify", str(copy)]), "val.bin", silent=False)
    refused(capsys, lambda: prepare.main(["verify"]), "verify: needs")


def test_a_resumed_run_notices_that_its_data_changed(copy, tmp_path, capsys):
    cfg = replace(tiny_run(copy), out_dir=str(tmp_path / "run"), samples=0)
    train.main(cfg)
    change(copy / "train.bin")
    refused(capsys, lambda: train.main(replace(cfg, steps=16), resume=True), "train.bin: damaged")


def test_prepared_data_of_a_later_version_is_refused(copy, capsys):
    path = copy / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | dict(version=3)))
    refused(capsys, lambda: read_meta(str(copy)), "version 3", "prepare.py text", "--overwrite")
    path.write_text(json.dumps({k: v for k, v in meta.items() if k not in ("version", "checksum")}))
    assert read_meta(str(copy))["splits"] == meta["splits"]  # version 1 means the same


def test_a_changed_count_in_meta_is_refused(copy, capsys):
    """It would change bits per character."""
    path = copy / "meta.json"
    text = path.read_text()
    characters = json.loads(text)["splits"]["val"]["characters"]
    path.write_text(text.replace(f'"characters": {characters}', f'"characters": {characters + 1}'))
    refused(capsys, lambda: read_meta(str(copy)), "meta.json: damaged: wrong checksum")


def test_partial_results_are_dropped_from_the_first_bad_record_on():
    records = [bytes([i]) * 16 for i in range(5)]
    file = io.BytesIO()
    for record in records:
        write_record(file, record)
    whole = file.getvalue()

    def read(data):
        file = io.BytesIO(data)
        found = [record for _ in records if (record := read_record(file, 16))]
        assert file.getvalue() == data[: 20 * len(found)]
        return found

    assert read(whole) == records
    assert read(whole[:45] + b"x" + whole[46:]) == records[:2]
    assert read(whole[:-1]) == records[:4]
    assert read(whole[20:40] + whole[:20] + whole[40:]) == []  # each record has its place


def test_a_damaged_partial_file_does_not_change_the_bound(corpus, checkpoint, tmp_path):
    model, cfg = load(checkpoint)
    ids, meta = read_split(str(corpus), "val", cfg)
    run = lambda partial: evaluate.bound(model, ids[:999], meta, cfg, "val", partial=partial)
    want = run(None)
    assert run(path := tmp_path / "a.partial") == want
    change(path, at=20)
    assert run(path) == want == run(path)


def test_tokens_of_padded_splits_are_counted_once_per_run(corpus, tmp_path, monkeypatch):
    calls, real = [], evaluate.count_tokens
    monkeypatch.setattr(evaluate, "count_tokens", lambda *a: calls.append(1) or real(*a))
    train.main(replace(tiny_run(corpus), out_dir=str(tmp_path / "run"), samples=0))
    assert len(calls) == 1


# --------------------------------------------------------------------------------------------------
# Damaged text: every reader of JSON, of configs and of tokenizers


def readers(folder, cfg):
    """{file: what reads it}, of a run's folder, a corpus and a data set that is being prepared."""
    plan, target = dict(shards=["a"], recipe={}), folder / "shards" / "00000"
    target.parent.mkdir()
    for suffix in (".bin", ".sizes"):
        target.with_suffix(suffix).touch()
    record = dict(input=["a"], sha256="0", bytes=[0, 0], notes={})
    target.with_suffix(".json").write_text(json.dumps(record))
    begin_or_resume(target.parent, plan)
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    (folder / "log.jsonl").write_text('{"step": 5, "final": {"nats": 1.5}}\n' * 3)
    (folder / "spec.json").write_text(json.dumps(CHARACTERS))
    (folder / "meta.json").write_text(Path(cfg.data, "meta.json").read_text())
    resume = ["--resume", f"--out_dir={folder}"]
    return {
        "shards/plan.json": lambda: begin_or_resume(target.parent, plan),
        "shards/00000.json": lambda: is_complete(target, ["a"]),
        "config.json": lambda: from_cli(resume, flags=[("resume", "")]),
        "log.jsonl": lambda: is_finished(folder / "log.jsonl", 5),
        "spec.json": lambda: tokenizer_of(read_json(folder / "spec.json", {}), 27),
        "meta.json": lambda: read_meta(f"{folder}/"),
    }


def test_damaged_text_is_one_line(corpus, tmp_path, rng):
    """Random damage, and what JSON allows but no reader expects."""
    odd = [
        b"",
        b"null",
        b"[]",
        b"3",
        b'{"a": 1}',
        b"[" * 100_000 + b"\n",
        b'{"a":' * 100_000 + b"\n",
        b"\xff\xfe",
    ]
    swaps = [(b"1", b"1.5"), (b"0", b"true"), (b'"', b"[]"), (b"{", b"[{"), (b"5", b"null")]
    for name, read in readers(tmp_path, tiny_run(corpus)).items():
        path = tmp_path / name
        whole = path.read_bytes()
        read()
        damaged = odd + [whole.replace(a, b, n) for a, b in swaps for n in (1, -1)]
        kinds = list(attack.DAMAGE.values())
        damaged += [attack.damage(rng.choice(kinds), whole, rng) for _ in range(60)]
        for text in damaged:
            path.write_bytes(text)
            try:
                read()
            except UserError as e:
                assert "\n" not in str(e)


@pytest.mark.parametrize(
    "spec, words",
    [
        ({}, "unknown kind of tokenizer None"),
        ({"kind": []}, "unknown kind"),
        ({"kind": "char"}, "char tokenizer that cannot be built (KeyError: 'characters')"),
        ({"kind": "char", "characters": [1, 2]}, "char tokenizer"),
        ({"kind": "char", "characters": "abc"}, "3 pieces, but the model has 27"),
        ({"kind": "bpe"}, "bpe tokenizer that cannot be built"),
        ({"kind": "bpe", "json": "{"}, "bpe tokenizer that cannot be built"),
        ({"kind": "bpe", "json": 5}, "bpe tokenizer that cannot be built"),
        ({"kind": "wordpiece", "vocab": 5}, "wordpiece tokenizer that cannot be built"),
        ({"kind": "wordpiece", "vocab": "a"}, "not a WordPiece vocabulary"),
        ({"kind": "llama"}, "not a tokenizer.json of Llama's form"),
        ({"kind": "llama", "json": "[" * 10**5}, "not a tokenizer.json of Llama's form"),
    ],
)
def test_a_damaged_tokenizer_in_a_checkpoint_is_one_line(corpus, tmp_path, spec, words, capsys):
    path = save(tmp_path / "ckpt.pt", tiny_run(corpus), tokenizer=spec)
    refused(capsys, lambda: sample.main([str(path), "--steps", "2"]), words)


def test_fields_are_checked_by_name_and_type(capsys):
    check = lambda **value: check_fields(value, dict(a=int, b=bool, c=int | None), "here")
    assert check(a=1, b=True, c=None)
    for value in (dict(b=True), dict(a=1.0, b=True), dict(a=True, b=True), dict(a=1, b=0)):
        refused(capsys, lambda value=value: check(**value), "here: damaged: ")
    refused(capsys, lambda: from_dict({"n_layer": 2.0}, "x"), "n_layer=2.0")
    refused(capsys, lambda: from_dict({"n_layr": 2}, "x"), "n_layr")


def test_a_log_is_read_up_to_its_first_damaged_line(tmp_path):
    lines = '{"step": 1}\n{"note": "a"}\n{"step": "x"}\n{"step": 3, "final": 0}\n'
    assert [*read_log(io.StringIO(lines))] == [{"step": 1}, {"note": "a"}]
    path = tmp_path / "log.jsonl"
    path.write_text(lines)
    assert not is_finished(path, 3)
    path.write_text('{"step": 3,"final":0}\n{"step": 30, "final')
    assert is_finished(path, 3) and not is_finished(path, 30)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints_of_other_versions(corpus, tmp_path, capsys):
    """A later one is refused. An older one is read, but not resumed: its noise was another."""
    cfg = replace(tiny_run(corpus), out_dir=str(tmp_path), samples=0)
    train.main(cfg)
    path = tmp_path / "ckpt.pt"
    state = read_checkpoint(path)
    torch.save(state | dict(version=3), path)
    refused(capsys, lambda: load(path), "version 3", "versions 1 to 2")
    del state["version"]
    torch.save(state, path)
    load(path)
    longer = replace(cfg, steps=16)
    refused(capsys, lambda: train.main(longer, resume=True), "version 1", f"--init_from={path}")


def test_a_small_file_that_claims_large_tensors_is_refused(corpus, tmp_path, capsys):
    cfg = tiny_run(corpus)
    state = read_checkpoint(save(tmp_path / "a.pt", cfg))
    state["model"] = {n: torch.zeros(1).expand(p.shape) for n, p in state["model"].items()}
    state["model"]["head.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(state, tmp_path / "a.pt")
    refused(capsys, lambda: load(tmp_path / "a.pt", ema=False), "more numbers than the file")


@pytest.mark.parametrize("name", ["a.ckpt", "a.pth", "pytorch_model.bin"])
def test_convert_verifies_checksums(name, tmp_path, capsys):
    """Of any file of torch.save: the first tensor's last byte is changed."""
    path = tmp_path / name
    torch.save({"state_dict": {"backbone.a": torch.arange(1000.0)}}, path)
    with zipfile.ZipFile(path) as archive:
        place = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
    change(path, at=place.header_offset + 2000)
    refused(capsys, lambda: convert.main([str(path), str(tmp_path / "x.pt")]), "wrong checksum")


def test_convert_refuses_a_zip_bomb_unread(tmp_path, capsys):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    refused(capsys, lambda: convert.main([str(path), str(tmp_path / "x.pt")]), "compressed")


def header(size=None, **tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


def tensor(start, end, shape, dtype="F32"):
    return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4,
        header(size=2**63, a=tensor(0, 4, [1])) + bytes(4),
        header(size=2**40, a=tensor(0, 4, [1])) + bytes(4),
        header(size=99, a=tensor(0, 4, [1])) + bytes(4),
        header(a=tensor(0, 2**40, [2**38])) + bytes(4),  # claims a terabyte
        header(a=tensor(0, 4, [2**62])) + bytes(4),
        header(a=tensor(0, 4, [2**62, 2**62])) + bytes(4),  # overflows
        header(a=tensor(0, 8, [2]), b=tensor(4, 12, [2])) + bytes(12),  # overlap
        header(a=tensor(0, 4, [1]), b=tensor(8, 12, [1])) + bytes(12),  # a gap
        header(a=tensor(4, 0, [1])) + bytes(4),
        header(a=tensor(0, 4, [-1])) + bytes(4),
        header(a=tensor(0, 4, [1], "OBJECT")) + bytes(4),
        header(a=tensor(0, 4, [1])) + bytes(100),  # more than the header says
        struct.pack("<Q", 10**5) + b"[" * 10**5,
    ],
)
def test_hostile_safetensors_are_one_line(content, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    outcome, _ = attack.try_to_read(lambda: convert.read_tensors(path), len(content))
    assert outcome == "refused"


def test_a_hub_folder_with_changed_weights_is_refused(checkpoint, tmp_path, capsys):
    convert.main([str(checkpoint), str(tmp_path / "hub")])
    change(tmp_path / "hub" / "model.safetensors", at=-1)
    back = [str(tmp_path / "hub"), str(tmp_path / "back.pt")]
    capsys.readouterr()
    refused(capsys, lambda: convert.main(back), "model.safetensors: damaged", "sha256")


# --------------------------------------------------------------------------------------------------
# Inputs of prepare.py


def zip_with(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "../"), content)
    return path


def test_a_zip_bomb_as_text8_is_refused_unread(tmp_path, refuses):
    path = zip_with(tmp_path / "bomb.zip", text8=bytes(2 * 10**8))
    refuses(["text8", "--input", path], "bomb.zip", "200,000,000 characters")
    outcome, _ = attack.try_to_read(lambda: unzip_text8(path, "bomb.zip"), 0)
    assert outcome == "refused"


def test_members_with_dots_are_not_extracted(tmp_path, refuses):
    path = zip_with(tmp_path / "a.zip", __text8=b"a" * 100)
    refuses(["text8", "--input", path], "no member named text8")
    assert not [*tmp_path.rglob("text8")]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../evil"))
    refuses(["text8", "--input", tmp_path / "a.tar"], "characters")


def test_links_as_input(tmp_path, refuses):
    """A link is read like its target; a broken one, one to itself and a folder are one line."""
    (tmp_path / "a.txt").write_text("some words of text " * 100)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "folder.txt").symlink_to(tmp_path)
    argv = ["text", "--tokenizer", "char", "--out", f"{tmp_path}/x", "--input"]
    prepare.main([*argv, f"{tmp_path}/link.txt"])
    for name in ("broken", "loop", "folder"):
        refuses(["text", "--input", tmp_path / f"{name}.txt"], f"{name}.txt")
        refuses(["text8", "--input", tmp_path / f"{name}.txt"], f"{name}.txt")
