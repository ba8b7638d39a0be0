"""Corpora are read as they are, sides do not leak, token files are whole, batches repeat, and every bad input is one clear line."""
import gzip
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import SHARED

from minillm import data
from minillm.data import Batches, Corpus, TokenFile, in_validation, load_corpus, prepare, tokenize
from minillm.tales import TaleWorld
from minillm.tokenizer import CharTokenizer

CHARACTERS = CharTokenizer(sorted({chr(i) for i in range(32, 127)} | {"\n", "é"}), unknown="<|unknown|>",
                           special_tokens=("<|endoftext|>", "<|unknown|>"))
KINDS = ["windows", "packed", "documents"]


def file_of(documents, folder, name="some.tokens", tokenizer=CHARACTERS, **corpus) -> TokenFile:
    "A token file of the documents given."
    whole = Corpus("some", "train", lambda: iter(documents), **corpus)
    return tokenize(whole, tokenizer, folder / name, progress=False)


def random_documents(n, longest=60, seed=0):
    "Texts of 1 to `longest` letters."
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh "), rng.integers(1, longest))).strip() or "a" for _ in range(n)]


@pytest.fixture
def tale_files(tmp_path):
    return prepare("tales-short", CHARACTERS, tmp_path, max_samples=60, progress=False)


# Corpora

@pytest.mark.parametrize("name, world", [("tales", "full"), ("tales-short", "short")])
def test_tales_are_the_worlds_own_again_at_each_reading_and_the_sides_differ(name, world):
    train, validation = load_corpus(name, max_samples=20), load_corpus(name, "validation", max_samples=20)
    assert list(train) == list(train) == [t.text for t in islice(TaleWorld(world, seed=0).tales(), 20)]
    assert (train.world, train.split, validation.split) == (world, "train", "validation")
    assert not set(train) & set(validation)
    assert list(load_corpus(name, max_samples=20, seed=3)) != list(train)


def test_a_tales_corpus_has_a_thousand_tales_for_validation():
    assert sum(1 for _ in load_corpus("tales-short", "validation")) == 1000


def test_pydocs_are_topics_and_docstrings_read_without_importing():
    sentinel = "turtledemo.clock"                       # importing it would open a window
    documents = data.pydocs()
    assert sentinel not in sys.modules
    assert 1_200_000 < sum(map(len, documents)) < 5_000_000 and len(documents) > 5_000
    assert any(d.startswith("dumps(obj, *") and "Serialize ``obj`` to a JSON formatted ``str``" in d for d in documents)
    assert any('The "if" statement' in d[:60] for d in documents)


def test_docstrings_stand_below_the_name_they_belong_to():
    source = '"""About."""\nclass A:\n    """Of A."""\n    async def f(self, x: int = 1, *rest):\n        """Of f.\n\n        More."""\ndef g(): pass'
    assert list(data.docstrings(source, "m")) == ["module m\n\nAbout.", "class A\n\nOf A.", "f(self, x: int=1, *rest)\n\nOf f.\n\nMore."]


def test_pycode_is_the_library_without_its_tests():
    sources = list(islice(data.pycode(), 400))
    assert sum(map(len, sources)) > 2_000_000 and any("def dumps(obj, *" in s for s in sources)
    assert not any(set(p.parts) & {"test", "tests", "site-packages"} for p in data.library_files())


def test_both_sides_of_a_corpus_are_all_of_it_and_the_share_is_about_right():
    everything = [d for d in data.pydocs() if d.strip()]
    train, validation = list(load_corpus("pydocs")), list(load_corpus("pydocs", "validation"))
    assert Counter(train) + Counter(validation) == Counter(everything)
    assert 0.07 < len(validation) / len(everything) < 0.13
    assert not {" ".join(d.split()) for d in train} & {" ".join(d.split()) for d in validation}
    assert 0.003 < len(list(load_corpus("pydocs", "validation", validation_share=0.01))) / len(everything) < 0.02
    assert list(load_corpus("pydocs", validation_share=0.0)) == everything


def test_a_documents_side_depends_on_its_words_and_the_seed_only():
    documents = random_documents(4000)
    share = sum(in_validation(d, 0.25) for d in documents) / len(documents)
    assert 0.22 < share < 0.28
    assert all(in_validation(f"  {d}\n", 0.25) == in_validation(d, 0.25) for d in documents)
    assert [in_validation(d, 0.25, seed=1) for d in documents] != [in_validation(d, 0.25) for d in documents]
    assert all(in_validation(d, 0.5) for d in documents if in_validation(d, 0.25)), "a larger share only adds"


def test_max_samples_counts_documents_before_the_split():
    both = list(load_corpus("pydocs", max_samples=300)) + list(load_corpus("pydocs", "validation", max_samples=300))
    assert Counter(both) == Counter(data.pydocs()[:300])


# Files of one's own

TEXT = "One fish.\n\nTwo fish, with é and €.\n"

@pytest.mark.parametrize("name, write", [
    ("a.txt", lambda p: p.write_text(TEXT, encoding="utf-8")),
    ("a.md", lambda p: p.write_text(TEXT, encoding="utf-8")),
    ("a.txt.gz", lambda p: p.write_bytes(gzip.compress(TEXT.encode()))),
    ("a.log", lambda p: p.write_text(TEXT, encoding="utf-8")),
    ("bom.txt", lambda p: p.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())),
    ("windows.txt", lambda p: p.write_bytes(TEXT.replace("\n", "\r\n").encode())),
])
def test_a_text_file_is_read_as_it_is(tmp_path, name, write):
    write(tmp_path / name)
    assert list(load_corpus(tmp_path / name, validation_share=0.0)) == [TEXT.strip()]


@pytest.mark.parametrize("field", ["text", "story"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_are_documents(tmp_path, ending, field):
    path, texts = tmp_path / f"rows{ending}", ["one\ntwo", "é", "three"]
    rows = [{"id": i, field: text} for i, text in enumerate(texts)] + [{"id": 9, field: None}]
    if ending == ".parquet":
        import pyarrow, pyarrow.parquet                                                # noqa: E401, I001
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else: path.write_bytes((gzip.compress if ending.endswith("gz") else bytes)("\n".join(map(json.dumps, rows)).encode()))
    corpus = load_corpus(path, field=field, validation_share=0.0)
    assert list(corpus) == list(corpus) == texts
    with pytest.raises(ValueError, match=rf"no column 'other', only 'id', '{field}'"): list(load_corpus(path, field="other"))
    with pytest.raises(ValueError, match="column 'id' .* holds int, not text"): list(load_corpus(path, field="id"))


def test_a_folder_is_its_text_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("bee"); (tmp_path / "deep" / "a.md").write_text("ay"); (tmp_path / "x.bin").write_bytes(b"\0")
    (tmp_path / "empty.txt").write_text("")
    assert list(load_corpus(str(tmp_path), validation_share=0.0)) == ["bee", "ay"]


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * (i % 90) for i in range(4000)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    documents = list(load_corpus(tmp_path / "long.txt", validation_share=0.0))
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert len(documents) > 80 and max(map(len, documents)) < 30_000


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, "line\n" * 20_000])
@pytest.mark.parametrize("piece", [7, 1000, 100_000])
def test_text_without_blank_lines_is_cut_too_in_whatever_pieces_it_comes(text, piece):
    documents = list(data.text_documents((text[i:i + piece] for i in range(0, len(text), piece)), 1000))
    assert max(map(len, documents)) <= 3000 and re.sub(r"\s", "", "".join(documents)) == re.sub(r"\s", "", text)


def test_a_separator_marks_documents(tmp_path):
    (tmp_path / "stories.txt").write_text("one\n\nfish\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert list(load_corpus(tmp_path / "stories.txt", validation_share=0.0)) == ["one\n\nfish", "two"]


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"", r"empty\.txt is empty \(0 bytes\)"),
    ("picture.png", b"ab\0cd", r"picture\.png is a binary file \(zero byte at 2\)"),
    ("latin.txt", "caf\xe9 au lait".encode("latin-1"), r"latin\.txt is not UTF-8: byte 3 is 0xe9"),
    ("late.txt", b"a" * (1 << 20) + "é".encode()[:1], r"byte 1048576 is 0xc3"),
    ("split.txt", b"a" * ((1 << 20) - 1) + b"\xc3(", r"byte 1048575 is 0xc3"),
    ("cut.txt.gz", gzip.compress(b"abc" * 1000, mtime=0)[:-9], r"cut\.txt\.gz is no whole gzip file"),
    ("not.txt.gz", b"plain text", r"not\.txt\.gz is no whole gzip file"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2 is not JSON"),
    ("list.jsonl", b'["a"]\n', r"list\.jsonl, line 1 is no object"),
])
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error: list(load_corpus(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, error, message", [
    ("no/such/file.txt", FileNotFoundError, "no file, folder or corpus 'no/such/file.txt'"),
    ("tale", FileNotFoundError, "did you mean 'tales'"),
    ("xyz", FileNotFoundError, "named corpora are tales, tales-short, pydocs"),
    ({"tales": -1.0}, ValueError, "must be positive"),
    ({}, ValueError, "must be positive"),
])
def test_a_corpus_that_is_not_there_is_one_clear_line(name, error, message):
    with pytest.raises(error, match=message): load_corpus(name)


@pytest.mark.parametrize("settings, message", [({"split": "test"}, "split is 'test'"), ({"max_samples": 0}, "max_samples is 0"),
                                               ({"validation_share": 1.0}, "validation_share is 1.0")])
def test_settings_of_a_corpus_are_checked(settings, message):
    with pytest.raises(ValueError, match=message): load_corpus("tales", **settings)


def test_an_empty_folder_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no text in folder"): load_corpus(tmp_path)


# Mixtures

@pytest.mark.parametrize("source", ["tales-short:0.7,pydocs:0.3", {"tales-short": 7, "pydocs": 3}])
def test_a_mixture_has_its_shares_of_characters_from_the_first_documents_on(source):
    size, docs = Counter(), set(data.pydocs())
    for n, document in enumerate(islice(load_corpus(source), 3000)):
        size[document in docs] += len(document)
        if n > 500: assert abs(size[False] / size.total() - 0.7) < 0.05
    assert abs(size[False] / size.total() - 0.7) < 0.01


def test_a_mixture_ends_with_its_first_exhausted_part_and_keeps_its_sides_apart(tmp_path):
    assert list(data.mix([["a"] * 10, ["b"] * 2], [1, 1])) == ["a", "b", "a", "b", "a"]
    for name in "ab": (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i}. " + "x" * 600 for i in range(300)))
    source = f"{tmp_path / 'a.txt'}:1,{tmp_path / 'b.txt'}:1"
    train, validation = set(load_corpus(source)), set(load_corpus(source, "validation"))
    assert train and validation and not train & validation
    assert {d[0] for d in train} == {d[0] for d in validation} == {"a", "b"}
    assert len(list(load_corpus(source, max_samples=7))) == 7


# The hub, without a network

WIKI = ["", " = Robin = \n", "", " A bird . \n", "", " = = Song = = \n", "", " It sings a = b . \n", "", " = Wren = \n", "", " Small . \n"]

def test_lines_of_wikitext_become_articles():
    robin, wren = (d for d in data.articles(WIKI) if d)
    assert robin.startswith(" = Robin = ") and " = = Song = = " in robin and robin.endswith("It sings a = b . ")
    assert wren == " = Wren = \n\n Small . "


def test_the_sixty_articles_of_wikitext_2_validation_are_found(shared_text):
    text = shared_text("wikitext-2.valid.txt")
    documents = [d for d in data.articles(text.splitlines(keepends=True)) if d.strip()]
    assert len(documents) == 60 and "".join("\n".join(documents).split()) == "".join(text.split())


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    "A function that makes `load_dataset` of any id read local files of the same columns, through the same library."
    def serve(kind, **parts):
        files = {}
        for part, rows in parts.items():
            path = files[part] = str(tmp_path / f"{part}.{kind}")
            if kind == "parquet":
                import pyarrow, pyarrow.parquet                                        # noqa: E401, I001
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": row} for row in rows]), path)
            elif kind == "json": open(path, "w").write("\n".join(json.dumps({"text": row}) for row in rows))
            else: open(path, "w").write("\n".join(row.rstrip("\n") for row in rows))
        opened = data.open_rows
        monkeypatch.setattr(data, "open_rows", lambda source, config=None, streaming=True: opened(kind, data_files=files, streaming=streaming))
        monkeypatch.setattr(data, "reachable", lambda url: True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return serve


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_tinystories_is_streamed_by_datasets_with_its_own_validation_part(local_hub, kind):
    local_hub(kind, train=[f"Story {i}." for i in range(500)], validation=["Last."])
    assert list(load_corpus("tinystories", max_samples=3)) == ["Story 0.", "Story 1.", "Story 2."]
    assert list(load_corpus("tinystories", "validation")) == ["Last."]
    shared = list(load_corpus("tinystories", "validation", validation_share=0.1))
    assert 20 < len(shared) < 90 and "Last." not in shared


@pytest.mark.parametrize("kind", ["parquet", "json", "text"])
def test_wikitext_103_is_rejoined_and_split_either_way(local_hub, kind):
    article = lambda i: ["", f" = Title {i} = \n", "", f" Text {i} . \n"]
    local_hub(kind, train=[line for i in range(300) for line in article(i)], validation=article("v"))
    train, own = list(load_corpus("wikitext-103")), list(load_corpus("wikitext-103", "validation"))
    assert (len(train), len(own)) == (300, 1) and train[7] == " = Title 7 = \n\n Text 7 . "
    parts = [list(load_corpus("wikitext-103", split, validation_share=0.1)) for split in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(train) and 10 < len(parts[1]) < 60


def test_any_data_set_of_the_hub_by_id_and_column(local_hub):
    local_hub("json", train=[f"Row {i}" for i in range(2000)])
    parts = [list(load_corpus("somebody/something:part", split)) for split in ("train", "validation")]
    assert len(parts[0] + parts[1]) == 2000 and 5 < len(parts[1]) < 50, "one in a hundred where it has no validation part"
    with pytest.raises(ValueError, match="no column 'story', only 'text'"): list(load_corpus("somebody/something", field="story"))


@pytest.mark.parametrize("name", ["tinystories", "somebody/something", "tinyshakespeare"])
def test_without_a_network_the_error_comes_within_ten_seconds_and_names_what_works(name, tmp_path):
    script = f"""if True:
        import socket, time
        def stuck(*_, **__): time.sleep(60)             # looking up a name that never answers
        socket.getaddrinfo = stuck
        from minillm.data import load_corpus
        start = time.time()
        try: load_corpus({name!r})
        except ValueError as error: print(time.time() - start, error)"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()}
    done = subprocess.run([sys.executable, "-c", script], env=environment | {"MINILLM_CACHE": str(tmp_path)}, capture_output=True, text=True)
    seconds, message = done.stdout.split(" ", 1)
    assert float(seconds) < 10 and "'pydocs', 'pycode', and files or folders of your own" in message and message.count("\n") == 1


def test_a_call_that_hangs_is_left_after_its_time():
    start = time.monotonic()
    with pytest.raises(TimeoutError): data.within(0.1, lambda: time.sleep(5))
    assert time.monotonic() - start < 2
    with pytest.raises(ZeroDivisionError): data.within(5, lambda: 1 / 0)
    assert data.within(5, lambda: 7) == 7


@pytest.fixture
def server(tmp_path):
    "A web server on this machine, of a folder."
    (tmp_path / "web").mkdir()
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield tmp_path / "web", f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_tinyshakespeare_is_downloaded_once_and_checked(server, tmp_path, monkeypatch):
    folder, url = server
    for name in [k for k in os.environ if "proxy" in k.lower()]: monkeypatch.delenv(name)
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    (folder / "input.txt").write_text("First Citizen:")
    right = hashlib.sha256(b"First Citizen:").hexdigest()
    with pytest.raises(ValueError, match="gave another file: SHA-256"): data.tinyshakespeare(f"{url}/input.txt", "0" * 64)
    assert not list((tmp_path / "cache").glob("*"))
    path = data.tinyshakespeare(f"{url}/input.txt", right)
    (folder / "input.txt").unlink()
    assert data.tinyshakespeare(f"{url}/input.txt", right) == path and path.read_text() == "First Citizen:"
    path.write_text("damaged")
    with pytest.raises(ValueError, match="must be downloaded once.*404"): data.tinyshakespeare(f"{url}/input.txt", right)


def test_the_checksum_is_tinyshakespeares(shared_text):
    assert hashlib.sha256(shared_text("tinyshakespeare.txt").encode()).hexdigest() == data.SHAKESPEARE[1]


# Token files

def test_a_token_file_holds_the_documents_between_eos(tmp_path):
    tokens = file_of(["ab", "c"], tmp_path)
    eos, a = CHARACTERS.eos_id, CHARACTERS.encode("a")[0]
    assert tokens.tokens.tolist() == [eos, a, a + 1, eos, a + 2, eos] and tokens.tokens.dtype == np.uint16
    assert tokens.documents.tolist() == [0, 3, 5]
    assert isinstance(tokens.tokens, np.memmap) and isinstance(tokens.documents, np.memmap)
    assert {"n_tokens": 6, "n_documents": 2, "n_bytes": 3, "dtype": "<u2", "eos_id": eos, "corpus": "some", "split": "train",
            "fingerprint": CHARACTERS.fingerprint, "vocab_size": CHARACTERS.vocab_size}.items() <= tokens.header.items()
    tokens.verify()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 5000])
def test_every_document_comes_back_from_a_token_file(tmp_path, n):
    documents = random_documents(n)
    tokens = file_of(documents, tmp_path)
    again = [CHARACTERS.decode(tokens.tokens[a + 1:b]) for a, b in zip(tokens.documents, tokens.documents[1:])]
    assert again == documents and (tokens.tokens[tokens.documents] == CHARACTERS.eos_id).all()
    assert tokens.n_tokens == sum(map(len, documents)) + n + 1


def test_a_large_vocabulary_needs_four_bytes(tmp_path):
    class Wide:
        vocab_size, eos_id, fingerprint = 2**16 + 1, 2**16, "wide"
        def encode_batch(self, texts): return [[2**16 - 1] for _ in texts]
    tokens = file_of(["a"], tmp_path, tokenizer=Wide())
    assert tokens.tokens.dtype == np.uint32 and tokens.tokens.tolist() == [2**16, 2**16 - 1, 2**16]


@pytest.mark.parametrize("change, message", [
    (lambda b: b[:-1], "bytes, its header says"), (lambda b: b + b"x", "bytes, its header says"), (lambda b: b"PK" + b[2:], "is no token file"),
])
def test_a_token_file_that_is_not_whole_is_refused(tmp_path, change, message):
    path = file_of(["abc"], tmp_path).path
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message): TokenFile(path)


@pytest.mark.parametrize("place", [data.HEADER_BYTES, data.HEADER_BYTES + 3, -1])
def test_a_changed_byte_is_found(tmp_path, place):
    path = file_of(["abc"], tmp_path).path
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"): TokenFile(path).verify()


def test_a_missing_token_file_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no token file .*; tokenize"): TokenFile(tmp_path / "none")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path, error):
    old = file_of(["old"], tmp_path).path.read_bytes()
    def broken():
        yield "new"
        raise error
    with pytest.raises(error): tokenize(broken(), CHARACTERS, tmp_path / "some.tokens", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["some.tokens"] and (tmp_path / "some.tokens").read_bytes() == old


def test_a_killed_writer_leaves_no_token_file(tmp_path):
    script = ("import os, sys\nfrom minillm.data import tokenize\nfrom minillm.tokenizer import CharTokenizer\n"
              "def documents():\n    for i in range(9): yield 'a' * 200_000\n    os.kill(os.getpid(), 9)\n"
              "tokenize(documents(), CharTokenizer(['a']), sys.argv[1], progress=False)")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.tokens")])
    assert done.returncode == -9 and not (tmp_path / "x.tokens").exists()


def test_no_text_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="the train part of some has no text"): file_of([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(n):
        tracemalloc.start()
        file_of((f"{i} " + "abcd " * 200 for i in range(n)), tmp_path, f"{n}.tokens")
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top
    peak(10)
    small, large = peak(1000), peak(8000)
    assert large < 1.1 * small and (tmp_path / "8000.tokens").stat().st_size > 15_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="address space limits are Linux's")
def test_a_file_larger_than_the_memory_allowed_for_it_is_read(tmp_path):
    "Touching a few windows of a 400 MB file must not make it resident."
    import resource
    path = tmp_path / "big.tokens"
    n = 200_000_000
    header = dict(n_tokens=n, n_documents=1, dtype="<u2", corpus="big", split="train", world=None, world_version=None, eos_id=0,
                  fingerprint=CHARACTERS.fingerprint, vocab_size=CHARACTERS.vocab_size, n_bytes=n, checksum="0")
    with open(path, "wb") as file:
        file.write((data.MAGIC + json.dumps(header).encode()).ljust(data.HEADER_BYTES))
        file.seek(data.HEADER_BYTES + 2 * n + 8)
        file.write(np.array([n - 1], "<u8").tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in zip(range(20), Batches(TokenFile(path), CHARACTERS, batch_size=8, sequence_length=512)): pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000, "kilobytes"


# prepare

class Counting:
    "A tokenizer that counts how many texts it encoded."
    def __init__(self): self.n = 0
    def __getattr__(self, name): return getattr(CHARACTERS, name)
    def encode_batch(self, texts):
        self.n += len(texts)
        return CHARACTERS.encode_batch(texts)


def test_prepare_tokenizes_once_and_anew_when_something_changed(tmp_path):
    text, counter = tmp_path / "my.txt", Counting()
    text.write_text("\n\n".join(f"Paragraph {i}. " + "x" * 600 for i in range(200)))
    first = prepare(text, counter, tmp_path / "cache", progress=False)
    once = counter.n
    assert once and [t.path for t in prepare(str(text), counter, tmp_path / "cache", progress=False)] == [t.path for t in first]
    assert counter.n == once
    prepare(text, counter, tmp_path / "cache", seed=1, progress=False)
    assert counter.n > once
    once = counter.n
    text.write_text(text.read_text() + "\n\nMore.")
    assert prepare(text, counter, tmp_path / "cache", progress=False)[0].path != first[0].path and counter.n > once
    assert [t.header["split"] for t in first] == ["train", "validation"] and first[0].corpus == str(text)


def test_prepare_takes_a_pair_of_texts_of_ones_own(tmp_path):
    counter = Counting()
    for _ in range(2): train, validation = prepare((["one", "two"], ["three"]), counter, tmp_path, progress=False)
    assert (train.n_documents, validation.n_documents, counter.n) == (2, 1, 3)
    train, validation = prepare((load_corpus("tales-short", max_samples=5), load_corpus("tales-short", "validation", max_samples=4)),
                                CHARACTERS, tmp_path, progress=False)
    assert (train.n_documents, validation.n_documents, train.world) == (5, 4, "short")


def test_a_small_text_gets_a_validation_part_and_a_tiny_one_an_error(tmp_path):
    for size in (2_000, 5_000, 20_000):
        (tmp_path / f"{size}.txt").write_text("".join(f"Line number {i} of a small text.\n" for i in range(size // 30)))
        assert all(t.n_documents for t in prepare(tmp_path / f"{size}.txt", CHARACTERS, tmp_path, progress=False))
    (tmp_path / "tiny.txt").write_text("Hello.")
    with pytest.raises(ValueError, match="too few different documents"): prepare(tmp_path / "tiny.txt", CHARACTERS, tmp_path)


def test_a_prepared_hub_data_set_needs_no_network_again(local_hub, tmp_path, monkeypatch):
    local_hub("json", train=[f"Story {i}." for i in range(50)], validation=["Last."])
    prepare("tinystories", CHARACTERS, tmp_path, max_samples=20, progress=False)
    monkeypatch.setattr(data, "open_hub", lambda *_: pytest.fail("asked the hub again"))
    train, validation = prepare("tinystories", CHARACTERS, tmp_path, max_samples=20, progress=False)
    assert (train.n_documents, validation.n_documents) == (20, 1)


# Batches

def test_targets_are_the_next_tokens_and_padding_is_masked():
    inputs, targets = data.collate([np.array([9, 1, 2, 3, 9], "u2"), np.array([9, 4, 9], "u2")], pad=9)
    assert inputs.tolist() == [[9, 1, 2, 3], [9, 4, 9, 9]] and inputs.dtype == torch.int64
    assert targets.tolist() == [[1, 2, 3, 9], [4, 9, -100, -100]] and targets.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence_length", [7, 64])
def test_every_target_follows_its_input_in_some_document(tmp_path, kind, sequence_length):
    documents = random_documents(100)
    eos = CHARACTERS.eos_id
    follows = {pair for d in documents for ids in [[eos, *CHARACTERS.encode(d), eos]] for pair in zip(ids, ids[1:])}
    for inputs, targets in Batches(file_of(documents, tmp_path), CHARACTERS, batch_size=8, sequence_length=sequence_length, kind=kind, epochs=2):
        assert inputs.shape == targets.shape and inputs.shape[1] <= sequence_length
        assert set(zip(inputs[targets != -100].tolist(), targets[targets != -100].tolist())) <= follows
        assert (inputs[targets == -100] == eos).all()
        assert torch.equal(inputs[:, 1:][targets[:, 1:] != -100], targets[:, :-1][targets[:, 1:] != -100])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, sequence_length, batch_size", [(1, 9, 1), (5, 3, 4), (200, 16, 8), (200, 70, 32)])
def test_one_pass_gives_each_token_once_always_in_the_same_order(tmp_path, kind, n, sequence_length, batch_size):
    tokens = file_of(random_documents(n), tmp_path)
    passes = [list(Batches(tokens, CHARACTERS, batch_size=batch_size, sequence_length=sequence_length, kind=kind, seed=seed).one_pass())
              for seed in (0, 1)]
    seen = torch.cat([targets[targets != -100] for _, targets in passes[0]])
    assert Counter(seen.tolist()) == Counter(tokens.tokens[1:].tolist())
    assert all(torch.equal(a, b) for one, other in zip(*passes) for a, b in zip(one, other))


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_starts_anywhere_in_the_file_so_that_a_part_of_it_is_a_sample(tmp_path, kind):
    documents = [letter * 20 for letter in "abcdefgh" for _ in range(100)]
    batches = Batches(file_of(documents, tmp_path), CHARACTERS, batch_size=8, sequence_length=21, kind=kind)
    seen = torch.cat([inputs.flatten() for inputs, _ in islice(batches.one_pass(), 8)])
    assert len(set(seen.tolist())) == 9


@pytest.mark.parametrize("sequence_length", [8, 100])
def test_documents_stand_each_in_a_row_and_longer_ones_go_on_in_the_next(tmp_path, sequence_length):
    documents = random_documents(150)
    tokens = file_of(documents, tmp_path)
    batches = Batches(tokens, CHARACTERS, batch_size=16, sequence_length=sequence_length, kind="documents", epochs=1)
    rows = [row[row != -100] for _, targets in batches for row in targets]
    assert sum(map(len, rows)) == tokens.n_tokens - 1 and max(map(len, rows)) <= sequence_length
    if sequence_length == 100: assert Counter(CHARACTERS.decode(row[:-1]) for row in rows) == Counter(documents)


def test_bucketing_keeps_all_rows_and_cuts_padding():
    lengths = np.random.default_rng(0).integers(10, 200, 5000)
    batches = data.bucketed(lengths, 16, np.random.default_rng(1))
    padded = lambda batches: 1 - lengths.sum() / sum(len(b) * lengths[b].max() for b in batches)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(5000))
    assert padded(batches) < 0.03 < 0.3 < padded(np.array_split(np.random.default_rng(1).permutation(5000), 313))
    assert not np.array_equal(lengths[np.concatenate(batches)], np.sort(lengths))


def test_packed_rows_are_the_documents_in_a_new_order_without_a_gap(tmp_path):
    documents = random_documents(80)
    tokens = file_of(documents, tmp_path)
    batches = Batches(tokens, CHARACTERS, batch_size=1, sequence_length=23, kind="packed")
    orders = []
    for epoch in range(2):
        first = epoch * batches.batches_per_epoch
        rows = [batches.batch(first + i) for i in range(batches.batches_per_epoch)]
        for (_, targets), (inputs, _) in zip(rows, rows[1:]): assert targets[0, -1] == inputs[0, 0]
        stream = [int(rows[0][0][0, 0]), *(i for _, targets in rows for i in targets[0].tolist())]
        texts = [CHARACTERS.decode(part) for part in split_at(stream, CHARACTERS.eos_id)]
        assert not Counter(texts[:-1]) - Counter(documents) and len(texts) > 70
        assert len(stream) > tokens.n_tokens - 25
        orders.append(texts)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("sequence_length", [1, 2, 3, 4, 6, 9, 10, 11])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_epochs_of_any_size_have_no_empty_batch(tmp_path, sequence_length, batch_size):
    batches = Batches(file_of(["abcdef", "abcde"], tmp_path), CHARACTERS, batch_size=batch_size, sequence_length=sequence_length, kind="packed", epochs=3)
    shapes = [tuple(inputs.shape) for inputs, _ in batches]
    assert len(shapes) == 3 * batches.batches_per_epoch and set(shapes) <= {(n, sequence_length) for n in range(1, batch_size + 1)}


def split_at(stream, eos):
    "Runs of a list between the elements `eos`, the empty one at its start left out."
    parts, part = [], []
    for i in stream:
        if i == eos: parts.append(part); part = []
        else: part.append(i)
    return parts[1:] + [part]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 9, 30])
def test_a_saved_position_is_exact(tmp_path, kind, stop):
    tokens = file_of(random_documents(90), tmp_path)
    make = lambda: Batches(tokens, CHARACTERS, batch_size=8, sequence_length=60, kind=kind, seed=5)
    whole, first = list(islice(make(), 40)), make()
    for _ in islice(first, stop): pass
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = list(islice(second, 40 - stop))
    assert len(whole) == stop + len(rest)
    assert all(torch.equal(a, b) for one, other in zip(whole[stop:], rest) for a, b in zip(one, other))


def test_a_state_saved_while_a_batch_is_in_use_counts_it(tmp_path):
    batches = Batches(file_of(random_documents(30), tmp_path), CHARACTERS, batch_size=4, sequence_length=16)
    for n, _ in enumerate(islice(batches, 5), 1): assert batches.state_dict()["step"] == n


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 4}, {"sequence_length": 12}, {"kind": "packed"}])
def test_a_position_of_other_data_is_refused(tmp_path, changed):
    tokens, settings = file_of(random_documents(90), tmp_path), dict(batch_size=8, sequence_length=16, kind="windows", seed=0)
    state = Batches(tokens, CHARACTERS, **settings).state_dict()
    with pytest.raises(ValueError, match=f"does not belong to this data: it has {next(iter(changed))}"):
        Batches(tokens, CHARACTERS, **settings | changed).load_state_dict(state)
    other = file_of(random_documents(91), tmp_path, "other.tokens")
    with pytest.raises(ValueError, match="checksum"): Batches(other, CHARACTERS, **settings).load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_end_and_seeds_differ(tmp_path, kind):
    tokens = file_of(random_documents(90), tmp_path)
    make = lambda **more: Batches(tokens, CHARACTERS, batch_size=8, sequence_length=60, kind=kind, **more)
    batches = make(epochs=3)
    assert len(list(batches)) == 3 * batches.batches_per_epoch
    assert not list(batches), "used up; a position can be loaded to start again"
    given = sum(int((targets != -100).sum()) for _, targets in make(epochs=1))
    assert abs(given / make().batches_per_epoch - make().tokens_per_batch) <= 1
    assert not all(a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(islice(make(seed=0), 5), islice(make(seed=1), 5)))
    first, again = list(make(epochs=2)), list(make(epochs=2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again))


def test_windows_start_anywhere_and_reach_both_ends(tmp_path):
    tokens = file_of(["abcdefgh" * 3], tmp_path)
    starts = {tuple(row.tolist()) for inputs, _ in islice(Batches(tokens, CHARACTERS, batch_size=8, sequence_length=20), 50) for row in inputs}
    assert starts == {tuple(tokens.tokens[i:i + 20].tolist()) for i in range(tokens.n_tokens - 20)}


@pytest.mark.parametrize("kind", ["windows", "packed"])
def test_a_text_shorter_than_a_row_is_one_clear_line_but_can_be_evaluated(tmp_path, kind):
    batches = Batches(file_of(["short"], tmp_path), CHARACTERS, batch_size=2, sequence_length=64, kind=kind)
    with pytest.raises(ValueError, match=r"the train part of some has 7 tokens; a row needs 6\d: give more text, or a smaller"): next(iter(batches))
    assert sum(int((targets != -100).sum()) for _, targets in batches.one_pass()) == 6


@pytest.mark.parametrize("settings, message", [({"kind": "rows"}, "kind is 'rows'; expected one of 'windows', 'packed', 'documents'"),
                                               ({"batch_size": 0}, "batch_size is 0"), ({"sequence_length": 0}, "sequence_length 0")])
def test_settings_of_batches_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message): Batches(file_of(["abc"], tmp_path), CHARACTERS, **dict(batch_size=1, sequence_length=2) | settings)


def test_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="was made by another tokenizer"):
        Batches(file_of(["abc"], tmp_path), CharTokenizer(["a", "b", "c"]), batch_size=1, sequence_length=2)


# The floor

def test_the_floor_of_a_batch_is_the_tales_own_log_probability(tale_files):
    train, validation = tale_files
    batches = Batches(train, CHARACTERS, batch_size=8, sequence_length=2000, kind="documents", epochs=1)
    nats = tokens = 0
    for inputs, targets in batches:
        floor = batches.floor(inputs, targets)
        assert floor[1] == int((targets != -100).sum())
        nats, tokens = nats + floor[0], tokens + floor[1]
    told = list(islice(TaleWorld("short", seed=0).tales(), 60))
    assert nats == pytest.approx(-sum(t.log_prob for t in told), abs=1e-9) and tokens == train.n_tokens - 1
    assert validation.world == "short"


def test_where_tales_are_cut_or_text_is_real_there_is_no_floor(tale_files, tmp_path):
    train, _ = tale_files
    for kind in ("windows", "packed"):
        batches = Batches(train, CHARACTERS, batch_size=4, sequence_length=100, kind=kind)
        assert batches.floor(*next(iter(batches))) is None
    batches = Batches(file_of(["abc"] * 9, tmp_path), CHARACTERS, batch_size=4, sequence_length=100, kind="documents")
    assert batches.floor(*next(iter(batches))) is None
    older = Batches(file_of([t.text for t in islice(TaleWorld("short").tales(), 4)], tmp_path, world="short", world_version="0 (older)"),
                    CHARACTERS, batch_size=4, sequence_length=2000, kind="documents")
    assert older.floor(*next(iter(older))) is None


def test_a_tale_longer_than_a_row_is_an_error_that_names_the_length(tale_files):
    longest = int(np.diff(tale_files[0].documents.astype(int)).max())
    with pytest.raises(ValueError, match=f"longest tale .* needs {longest}.*set sequence_length to {longest} or more"):
        Batches(tale_files[0], CHARACTERS, batch_size=4, sequence_length=longest - 1, kind="documents")
    Batches(tale_files[0], CHARACTERS, batch_size=4, sequence_length=longest, kind="documents")


# Devices

def test_a_gpu_gets_pinned_batches_that_are_not_waited_for(tmp_path, monkeypatch):
    calls = []
    class Tensor:
        def pin_memory(self): calls.append("pin"); return self
        def to(self, device, non_blocking=False): calls.append((str(device), non_blocking)); return self
    data.send((Tensor(), Tensor()), "cuda")
    assert calls == ["pin", ("cuda", True)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path):
    tokens = file_of(random_documents(90), tmp_path)
    make = lambda device: Batches(tokens, CHARACTERS, batch_size=8, sequence_length=16, device=device)
    for (a, b), (c, d) in zip(islice(make("cuda"), 20), make("cpu")):
        assert a.is_cuda and torch.equal(a.cpu(), c) and torch.equal(b.cpu(), d)


def test_real_text_goes_all_the_way(tmp_path):
    path = SHARED / "tinyshakespeare.txt"
    if not path.exists(): pytest.skip("tinyshakespeare.txt is not here")
    tokenizer = CharTokenizer.train([path.read_text(encoding="utf-8")])
    train, validation = prepare(path, tokenizer, tmp_path, progress=False)
    assert 0.05 < validation.n_tokens / (train.n_tokens + validation.n_tokens) < 0.2 and tokenizer.vocab_size == 66
    inputs, _ = next(iter(Batches(train, tokenizer, batch_size=4, sequence_length=256)))
    assert inputs.shape == (4, 256)
