"""Tokens are never read wrongly: files of other widths, headers and vocabularies, and weights that
do not fit, are refused in one line before anything is written."""

import base64
import json
import pickle

import numpy as np
import pytest
import torch

import model
from lawa_core import LawaError, save
from model import GPT, Config, gpt_config, open_corpus, train

TEXT = "To be, or not to be:\nthat is the question — ça va?\n" * 40
GPT2 = 50_257


def refusal(function, *arguments) -> str:
    with pytest.raises(LawaError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "; " in message  # what to do stands at the end
    return message


def as_files(folder, train, val, width="<u2"):
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(train).astype(width).tofile(folder / "train.bin")
    np.asarray(val).astype(width).tofile(folder / "val.bin")
    return folder


def draws(vocab_size, count=4000, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def with_header(path, numbers, tokens, width="<u2"):
    header = np.zeros(256, "<i4")
    header[: len(numbers)] = numbers
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype(width).tobytes())


def of_bytes(folder, text=TEXT):
    """A corpus of a token per byte."""
    ids = list(text.encode())
    as_files(folder, ids, ids[:500])
    meta = {"name": "bytes", "vocab_size": 256, "eot_token": 0, "tokenizer": "tokens"}
    counts = {"train_tokens": len(ids), "val_tokens": 500}
    (folder / "meta.json").write_text(json.dumps(meta | counts | {"pattern": "(?s:.)"}))
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (folder / "tokens").write_text("\n".join(lines))
    return folder


def of_characters(folder, **changes):
    """A corpus as nanoGPT's shakespeare_char has it."""
    characters = sorted(set(TEXT))
    numbers = {character: i for i, character in enumerate(characters)}
    ids = [numbers[character] for character in TEXT]
    as_files(folder, ids, ids[:500])
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": numbers}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta | changes))
    return folder


def command_line(folder, out, *more) -> list[str]:
    fixed = "--preset pico --max_iters 4 --warmup_iters 1 --ckpt_interval 2 --device cpu"
    return ["train", *fixed.split(), "--corpus", str(folder), "--out_dir", str(out), *more]


def refused_command(capsys, argv) -> str:
    assert model.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    return err


# ---- tokens of 4 bytes ----


@pytest.mark.parametrize("vocab_size", [2, 65, GPT2, 100_277, 200_019])
def test_tokens_of_four_bytes_are_refused(vocab_size, tmp_path):
    folder = as_files(tmp_path / "wide", draws(vocab_size), draws(vocab_size, seed=1), "<u4")
    message = refusal(open_corpus, folder)
    assert str(folder) in message
    assert "expected train tokens of 2 bytes, got 4" in message and "write uint16" in message


def test_tokens_of_four_bytes_in_one_file_are_refused(tmp_path):
    folder = as_files(tmp_path / "wide", draws(GPT2), draws(GPT2, seed=1))
    draws(GPT2, 1000).astype("<u4").tofile(folder / "val.bin")
    assert "expected val tokens" in refusal(open_corpus, folder)


def test_tokens_of_eight_bytes_are_refused(tmp_path):
    folder = as_files(tmp_path / "wide", draws(GPT2), draws(GPT2), "<u8")
    assert "expected train tokens of 2 bytes" in refusal(open_corpus, folder)


def test_a_meta_json_tells_the_width_by_its_count(tmp_path):
    folder = as_files(tmp_path / "wide", draws(300), draws(300, seed=1), "<u4")
    meta = {"name": "wide", "vocab_size": 300, "eot_token": 0, "tokenizer": "gpt2"}
    counts = {"train_tokens": 4000, "val_tokens": 4000}
    (folder / "meta.json").write_text(json.dumps(meta | counts))
    message = refusal(open_corpus, folder)
    assert "8000 tokens of 2 bytes" in message and "meta.json says 4000" in message
    counts = {"train_tokens": 8000, "val_tokens": 8000}  # tokens that do alternate with zeros
    (folder / "meta.json").write_text(json.dumps(meta | counts))
    assert np.array_equal(open_corpus(folder).train[::2], draws(300))


def test_the_command_refuses_tokens_of_four_bytes_and_leaves_nothing(tmp_path, capsys):
    folder = as_files(tmp_path / "wide", draws(GPT2), draws(GPT2), "<u4")
    assert "2 bytes" in refused_command(capsys, command_line(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def once(token, at, count=4000):
    tokens = draws(16, count)
    tokens[at] = token
    return tokens


NARROW = {  # tokens of 2 bytes that are not to be taken for others
    "GPT-2's": draws(GPT2),
    "nine in ten are 0": draws(GPT2) * (draws(10, seed=1) == 0),
    "99 in 100 are 0": draws(GPT2, 100_000) * (draws(100, 100_000, seed=1) == 0),
    "all are 0": np.zeros(4000, int),
    "one is not 0": np.arange(4000) == 2000,
    "begins with 0 only": np.append(np.zeros(3000, int), draws(GPT2, 1000)),
    "ends with 0 only": np.append(draws(GPT2, 1000), np.zeros(3000, int)),
    "padded to 512": np.pad(draws(GPT2, 300).reshape(10, 30), ((0, 0), (0, 482))).ravel(),
    "two tokens": draws(2),
    "16 tokens": draws(16),
    "a rare 17th": once(16, 2000),
    "a common one": np.where(draws(20) > 0, 13, draws(GPT2, seed=1)),
    "in turn, but one odd": np.append(np.stack([draws(GPT2), np.zeros(4000, int)], 1), 5),
    "in turn, but once": np.append(np.stack([draws(GPT2), np.zeros(4000, int)], 1), [5, 77]),
    "few": draws(GPT2, 80),
    "begins like a date": np.append([389, 309, 1, 0], draws(GPT2)),  # 20251013
    "a date, then few": np.append([389, 309, 1, 7], np.zeros(4000, int)),
}


@pytest.mark.parametrize("case", NARROW)
def test_tokens_of_two_bytes_are_read_as_they_are(case, tmp_path):
    tokens = np.asarray(NARROW[case])
    found = open_corpus(as_files(tmp_path / "theirs", tokens, tokens))
    assert np.array_equal(found.train, tokens) and np.array_equal(found.val, tokens)
    assert found.vocab_size == GPT2


def test_sparse_tokens_of_two_bytes_are_never_taken_for_four():
    for seed in range(300):
        generator = np.random.default_rng(seed)
        share = generator.uniform(0.01, 1)
        tokens = generator.integers(0, GPT2, 2000) * (generator.random(2000) < share)
        assert not model.four_bytes_each(tokens)


# ---- headers ----


HEADERS = {  # the numbers that it begins with, the tokens' type
    "llm.c's of 4 bytes": ([20240801, 1, 4000], "<u4"),
    "another date": ([20251013, 1, 4000], "<u2"),
    "another version": ([20240520, 2, 4000], "<u2"),
    "another layout": ([20250401, 3, 0, 17, 4000], "<u2"),
    "no date": ([0x7F4B1D, 1, 4000], "<u2"),
    "no date, of 4 bytes": ([0x7F4B1D, 1, 4000], "<u4"),
    "4 bytes under the right one": ([20240520, 1, 4000], "<u4"),
    "a wrong count": ([20240520, 1, 3999], "<u2"),
}


@pytest.mark.parametrize("name", ["train.bin", "theirs_train_000001.bin"])
@pytest.mark.parametrize("case", HEADERS)
def test_unknown_headers_are_refused(case, name, tmp_path):
    numbers, width = HEADERS[case]
    draws(GPT2).astype("<u2").tofile(tmp_path / "val.bin")
    with_header(tmp_path / name, numbers, draws(GPT2), width)
    message = refusal(open_corpus, tmp_path)
    assert name in message and f"its header says {numbers[0]}, {numbers[1]}" in message
    assert "expected 20240520, 1, " in message and "write uint16" in message


@pytest.mark.parametrize("name", ["train.bin", "theirs_train_000001.bin"])
def test_the_known_header_is_no_token(name, tmp_path):
    draws(GPT2).astype("<u2").tofile(tmp_path / "val.bin")
    with_header(tmp_path / name, [20240520, 1, 4000], draws(GPT2))
    assert np.array_equal(open_corpus(tmp_path).train, draws(GPT2))


# ---- vocabularies ----


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_at_the_vocabulary_is_refused(split, tmp_path, capsys):
    parts = {"train": draws(GPT2), "val": draws(GPT2)}
    parts[split][7] = GPT2
    folder = as_files(tmp_path / "theirs", **parts)
    assert f"holds token {GPT2}, but gpt2 has {GPT2};" in refusal(open_corpus, folder)
    refused_command(capsys, command_line(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_training_tokens_opens(tmp_path):
    folder = as_files(tmp_path / "text", [], draws(300))
    meta = {"name": "text", "vocab_size": 300, "eot_token": 0, "tokenizer": "gpt2"}
    counts = {"train_tokens": 0, "val_tokens": 4000}
    (folder / "meta.json").write_text(json.dumps(meta | counts))
    assert len(open_corpus(folder).train) == 0


def test_a_corpus_of_others_trains_and_speaks_by_the_command_line(tmp_path, capsys):
    folder = of_bytes(tmp_path / "bytes")
    assert model.main(command_line(folder, tmp_path / "run")) == 0
    assert model.main(["sample", str(tmp_path / "run"), "--tokens", "9", "--prompt", "ça "]) == 0
    assert "ça " in capsys.readouterr().out


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_characters_are_refused_and_their_pickle_runs_nothing(tmp_path, capsys):
    mark = tmp_path / "was here"
    for call in (5, Runs(exec, f"open({str(mark)!r}, 'w')"), Runs(open, str(mark), "w")):
        folder = of_characters(tmp_path / "chars", vocab_size=call)
        message = refusal(open_corpus, folder)
        assert "meta.json, which says whose the tokens are; run python" in message
        refused_command(capsys, command_line(folder, tmp_path / "run"))
    pickle.loads((folder / "meta.pkl").read_bytes())["vocab_size"].close()
    assert mark.exists()  # as it does where it is read
    mark.unlink()
    refusal(open_corpus, folder)
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_a_meta_json_goes_before_a_meta_pkl(tmp_path):
    folder = of_bytes(tmp_path / "bytes")
    (folder / "meta.pkl").write_bytes(b"junk")
    assert open_corpus(folder).vocab_size == 256


# ---- weights to start from ----


def unfit_weights(path, case) -> None:
    state = GPT(gpt_config("pico", 256)).state_dict()
    if case == "another preset":
        state = GPT(gpt_config("nano", 256)).state_dict()
    elif case == "another vocabulary":
        state = GPT(gpt_config("pico", GPT2)).state_dict()
    elif case == "other names":
        state = {f"{name}.x": tensor for name, tensor in state.items()}
    elif case == "a tensor less":
        del state["wpe.weight"]
    elif case == "a tensor more":
        state["lm_head.weight"] = torch.zeros(3, 3)
    if case == "no weights":
        path.write_bytes(b"junk")
    elif case != "no file":
        save(path, state)


OTHERS = ("another preset", "another vocabulary", "other names", "a tensor less", "a tensor more")


@pytest.mark.parametrize("case", ["no file", "no weights", *OTHERS])
def test_weights_that_do_not_fit_leave_no_run_folder(case, tmp_path, capsys):
    folder, start = of_bytes(tmp_path / "bytes"), tmp_path / "start.safetensors"
    unfit_weights(start, case)
    argv = command_line(folder, tmp_path / "runs" / "run", "--init_from", str(start))
    err = refused_command(capsys, argv)
    assert str(start) in err
    assert case not in OTHERS or "expected a pico; choose another" in err
    assert not (tmp_path / "runs").exists()


def test_weights_that_fit_are_started_from(tmp_path):
    folder, start = of_bytes(tmp_path / "bytes"), tmp_path / "start.safetensors"
    unfit_weights(start, "none")
    fields = {"max_iters": 1, "warmup_iters": 0, "ckpt_interval": 1, "init_from": str(start)}
    run = train(Config(preset="pico", corpus=str(folder), **fields), tmp_path / "run")
    assert (run / "ckpt_1.safetensors").exists()


def test_a_text_that_begins_with_padding_has_no_header(tmp_path):
    of_bytes(tmp_path)
    ids = [7, 0, 9, 0, *[0] * 600, *range(200)] * 3
    as_files(tmp_path, ids, ids)
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta |= {"train_tokens": len(ids), "val_tokens": len(ids)}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert model.open_corpus(tmp_path).train.tolist() == ids
