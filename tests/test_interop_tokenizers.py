"""Oracle of lesson 16's tokenizers: the library `tokenizers`, on files of the shapes that the families of models use."""
import json
import re
import unicodedata
from pydoc_data import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.interop import HUB_PATTERNS, tokenizer_from_hub, tokenizer_to_hub
from minillm.tokenizer import (
    END_OF_TEXT,
    PATTERNS,
    BPETokenizer,
    CharTokenizer,
    FallbackTokenizer,
    SentencePieceTokenizer,
    UnigramTokenizer,
    load_tokenizer,
)

hub = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

DOCS = [text for _, text in sorted(topics.topics.items())][:12] + ["naïve 狐 über, größer " * 20, "tick tock 9999  tick\n\n" * 9]
quick = settings(max_examples=120, deadline=None)
ASSIGNED = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]


def composes_alike(character: str) -> bool:
    "Whether the Unicode tables of `tokenizers`, of 2016, and Python's compose this character's neighbours alike."
    text = f"a{character}\u0301"
    return normalizers.NFC().normalize_str(text) == unicodedata.normalize("NFC", text)


KNOWN = [character for character in ASSIGNED if composes_alike(character)]
common = st.sampled_from([*" \n\t\r'sStTlLdDvVeErRmM.,!?0123456789ſK\u00a0\u3000é▁\u0301", "the", " the", "  ", "\n\n", "\r\n", "9999",
                          "'ll", " naïve", "狐", END_OF_TEXT, "<s>", "</s>", "<unk>", "<|im_end|>", "<0x41>", "<|begin_of_text|>"])
mixed = st.lists(st.one_of(st.sampled_from(KNOWN), common), max_size=40).map("".join)


def config(folder, eos, **more):
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, **more}))


def every_pair(vocab, key):
    "Merges as `transformers` writes them for converted models: of each token all pairs that are tokens, by rank."
    pairs = [(key(t), key(t[:i]), t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    return [(left, right) for *_, left, right in sorted(pairs)]


def byte_level(folder, pre, *, normalizer=None, special=(END_OF_TEXT,), first=(), alphabet=True, eos=END_OF_TEXT, begin=None, **model):
    "A byte-level BPE, trained and saved by `tokenizers`."
    made = hub.Tokenizer(models.BPE(**model))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, pre, decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    made.train_from_iterator(DOCS, trainers.BpeTrainer(vocab_size=900, initial_alphabet=letters, special_tokens=list(first), show_progress=False))
    made.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    if begin:
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
            single=f"{begin}:0 $A:0", pair=f"{begin}:0 $A:0 {begin}:1 $B:1", special_tokens=[(begin, made.token_to_id(begin))])])
    made.save(str(folder / "tokenizer.json"))
    config(folder, eos)
    return made


def split(name):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(HUB_PATTERNS[name]), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_gpt2(folder): return byte_level(folder, pre_tokenizers.ByteLevel(add_prefix_space=False))


def make_smollm(folder):
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return byte_level(folder, digits, first=[END_OF_TEXT, "<|im_end|>"], special=(), alphabet=False, eos="<|im_end|>")


def make_qwen(folder):
    return byte_level(folder, split("qwen2"), normalizer=normalizers.NFC(), special=(END_OF_TEXT, "<|im_end|>"), eos=END_OF_TEXT)


def make_llama3(folder):
    "Ranks of tiktoken with each pair that makes a token, tokens that no pair makes, and whole words looked up first."
    made = byte_level(folder, split("llama-bpe"), begin="<|begin_of_text|>", special=["<|begin_of_text|>", END_OF_TEXT])
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = {t: i for t, i in data["model"]["vocab"].items()}
    for alone in ("Ġzyzzyva", "qqqqq"): vocab[alone] = len(vocab)
    data["model"] |= {"vocab": vocab, "merges": every_pair(vocab, vocab.get), "ignore_merges": True}
    for place, token in enumerate(data["added_tokens"]): token["id"] = len(vocab) + place
    for token in data["post_processor"]["processors"][1]["special_tokens"].values(): token["ids"] = [len(vocab)]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return made.from_file(str(folder / "tokenizer.json"))


def byte_fallback(folder, *, normalizer=None, pre=None, all_pairs=True, old=False):
    "A BPE of characters with <0x..> to fall back on, in the order of Llama 2: special, bytes, merges, characters."
    trained = hub.Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(DOCS, trainers.BpeTrainer(vocab_size=900, show_progress=False, limit_alphabet=60))
    learned = json.loads(trained.to_str())["model"]
    by_id = sorted(learned["vocab"], key=learned["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(t for t in by_id if len(t) > 1), *(t for t in by_id if len(t) == 1)]
    vocab = {name: i for i, name in enumerate(names)}
    pieces = {t: i for t, i in vocab.items() if i > 258}
    merges = every_pair(pieces, lambda t: (pieces[t], -len(t))) if all_pairs else [tuple(pair) for pair in learned["merges"]]
    made = hub.Tokenizer(models.BPE(vocab=vocab, merges=merges[1:] if old else merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if normalizer: made.normalizer = normalizer
    if pre: made.pre_tokenizer = pre
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(name, normalized=old and name != "</s>") for name in ("<unk>", "<s>", "</s>")])
    made.save(str(folder / "tokenizer.json"))
    config(folder, {"content": "</s>", "lstrip": False}, bos_token="<s>")
    return made


def make_llama2(folder):
    return byte_fallback(folder, normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def make_old_llama2(folder):
    "As transformers converted it in early 2023: the first pair is forgotten, and special tokens are looked for behind the mark."
    steps = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return byte_fallback(folder, normalizer=steps, old=True)


def make_llama2_metaspace(folder): return byte_fallback(folder, pre=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def make_mistral(folder): return byte_fallback(folder, pre=pre_tokenizers.Metaspace(prepend_scheme="always", split=False), all_pairs=False)


def make_split_at_marks(folder): return byte_fallback(folder, pre=pre_tokenizers.Metaspace(prepend_scheme="first", split=True))


FAMILIES = {"gpt2": make_gpt2, "llama3": make_llama3, "smollm": make_smollm, "qwen": make_qwen, "llama2": make_llama2, "llama2-old": make_old_llama2,
            "llama2-metaspace": make_llama2_metaspace, "mistral": make_mistral, "split-at-marks": make_split_at_marks}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    "A file of a family: the library's tokenizer, ours, and the folder."
    folder = tmp_path_factory.mktemp(request.param)
    theirs = FAMILIES[request.param](folder)
    return theirs, tokenizer_from_hub(folder), folder


# Files of other people in

@given(text=mixed)
@quick
def test_ids_are_those_of_the_library_special_tokens_included(family, text):
    theirs, ours, _ = family
    assert ours.encode(text, "all") == theirs.encode(text, add_special_tokens=False).ids
    assert [*(ours.begin or []), *ours.encode(text, "all")] == theirs.encode(text).ids


def test_ids_are_those_of_the_library_on_whole_texts(family, shared_text):
    theirs, ours, _ = family
    for text in [*DOCS, *(document[::-1] for document in DOCS), "a" * 3000, " " * 999 + "=" * 4000, shared_text("tinyshakespeare.txt")[:100_000]]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_a_loaded_tokenizer_survives_being_saved(family, tmp_path):
    _, ours, _ = family
    ours.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint == ours.fingerprint and again.begin == ours.begin
    assert all(again.encode(text, "all") == ours.encode(text, "all") for text in DOCS)


def test_a_text_comes_back_and_special_tokens_are_known(family):
    theirs, ours, folder = family
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.eos_token == (json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] if "<s>" not in ours.special_tokens else "</s>")
    for text in DOCS:
        lost = "" if not getattr(ours, "lost", b"") else "[^\x00-\x7f]"
        assert lost or ours.decode(ours.encode(text)) == text == theirs.decode(ours.encode(text))


def test_bytes_that_a_file_lacks_are_dropped_as_the_library_drops_them(tmp_path):
    theirs = make_smollm(tmp_path)
    ours = tokenizer_from_hub(tmp_path)
    assert ours.lost and ours.encode("a\x00\x01b") == theirs.encode("a\x00\x01b").ids
    with pytest.raises(ValueError, match="tiktoken"): ours.to_tiktoken()


def test_only_an_odd_list_of_merges_is_kept(tmp_path):
    make_llama2(tmp_path)
    assert tokenizer_from_hub(tmp_path).merges is None and not tokenizer_from_hub(tmp_path).marked
    make_old_llama2(tmp_path)
    ours = tokenizer_from_hub(tmp_path)
    assert ours.merges and ours.marked == ["<unk>", "<s>"]
    assert ours.encode("<s>a", "<s>")[0] == 1 and 1 not in ours.encode("a<s>", "all") and 1 not in ours.encode("<s>a")
    with pytest.raises(ValueError, match="nobody"): ours.encode("a", ["nobody"])


def test_what_composes_otherwise_are_young_combining_marks():
    strange = set(ASSIGNED) - set(KNOWN)
    assert len(strange) < 200 and all(unicodedata.combining(character) for character in strange)


# Ours out

@pytest.fixture(scope="module", params=[*PATTERNS, r"[\p{L}\s]+", "unigram", "characters", "unknown", "nfc", "gaps", "sentencepiece"])
def own(request, tmp_path_factory):
    "A tokenizer of ours and the folder it was written to."
    folder, kind = tmp_path_factory.mktemp("own"), request.param
    bpe = BPETokenizer.train(DOCS, 700, ["<|im_end|>"], pattern=kind if kind in PATTERNS else "gpt2")
    match kind:
        case "unigram": ours = UnigramTokenizer.train(DOCS, 500)
        case "characters": ours = CharTokenizer.train([*DOCS, *ASSIGNED])
        case "unknown": ours = CharTokenizer.train(DOCS, unknown="<unk>")
        case "nfc": ours = BPETokenizer(bpe.ranks, "gpt4", bpe.special_tokens, normalize="NFC")
        case "gaps":
            ranks = {token: rank + 7 for token, rank in bpe.ranks.items()} | {b"qqqq": 1000}
            ours = BPETokenizer(ranks, "gpt2", {END_OF_TEXT: 3, "</s>": 2000}, "</s>")
            ours.begin = [3]
        case "sentencepiece":
            pytest.importorskip("sentencepiece")
            ours = SentencePieceTokenizer.train([line for text in DOCS for line in text.splitlines()], 900)
        case _: ours = bpe if kind in PATTERNS else BPETokenizer.train(DOCS, 700, pattern=kind)
    tokenizer_to_hub(ours, folder)
    return ours, hub.Tokenizer.from_file(str(folder / "tokenizer.json")), folder


@given(text=mixed)
@quick
def test_our_ids_are_the_librarys(own, text):
    ours, theirs, _ = own
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text, "all")
    assert theirs.encode(text).ids == [*(ours.begin or []), *ours.encode(text, "all")]


def test_what_went_out_comes_back_unchanged(own):
    ours, theirs, folder = own
    again = tokenizer_from_hub(folder)
    if isinstance(ours, SentencePieceTokenizer): assert isinstance(again, FallbackTokenizer)
    else: assert type(again) is type(ours) and again.fingerprint == ours.fingerprint and again.begin == ours.begin
    for text in DOCS:
        ids = ours.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_auto_tokenizer_gives_the_same_ids(own): check_auto(own[0], own[2])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "mistral"])
def test_auto_tokenizer_gives_the_same_ids_beside_any_model(three, tmp_path, model_type):
    ours, _, _ = three
    tokenizer_to_hub(ours, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": ours.vocab_size}))
    check_auto(ours, tmp_path)


def check_auto(ours, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*DOCS, "", " a  b", f"one{END_OF_TEXT} two", "é e\u0301 狐 12345"]:
        if isinstance(ours, CharTokenizer) and ours.unknown is None and set(text) - ours.ids.keys(): continue
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, "all")
        assert theirs(text)["input_ids"] == [*(ours.begin or []), *ours.encode(text, "all")]
    assert theirs.eos_token_id == ours.eos_id and theirs.bos_token_id == (ours.begin or [ours.eos_id])[0]


def test_beside_a_qwen2_model_only_qwens_tokenizer_can_stand(tmp_path):
    "transformers 5 builds that one anew from the vocabulary, whatever tokenizer.json says."
    transformers = pytest.importorskip("transformers")
    (tmp_path / "one").mkdir()
    make_qwen(tmp_path / "one")
    qwen, other = tokenizer_from_hub(tmp_path / "one"), BPETokenizer.train(DOCS, 400)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="qwen2"): tokenizer_to_hub(other, tmp_path)
    tokenizer_to_hub(qwen, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*DOCS, "e\u0301 12 <|im_end|>"]: assert theirs(text)["input_ids"] == qwen.encode(text, "all")


def test_a_loaded_family_goes_out_again(family, tmp_path):
    theirs, ours, _ = family
    tokenizer_to_hub(ours, tmp_path)
    again, file = tokenizer_from_hub(tmp_path), hub.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.fingerprint == ours.fingerprint and again.begin == ours.begin
    for text in [*DOCS, "a <s>b </s> c", "  "]: assert file.encode(text).ids == theirs.encode(text).ids


@given(text=st.text(st.sampled_from(ASSIGNED), max_size=40))
@quick
def test_one_bpe_has_the_same_ids_in_three_libraries(three, text):
    ours, rust, theirs = three
    assert ours.encode(text) == rust.encode_ordinary(text) == theirs.encode(text).ids


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    ours, folder = BPETokenizer.train(DOCS, 900, pattern="gpt4"), tmp_path_factory.mktemp("three")
    tokenizer_to_hub(ours, folder)
    return ours, ours.to_tiktoken(), hub.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_a_character_that_is_unknown_is_an_error_there_as_well(tmp_path):
    tokenizer_to_hub(CharTokenizer("abc"), tmp_path)
    theirs = hub.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("cab").ids == [2, 0, 1]
    with pytest.raises(Exception, match="(?i)unk"): theirs.encode("cabx")


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": True}])
def test_a_sentencepiece_model_has_the_same_ids(tmp_path, options):
    pytest.importorskip("sentencepiece")
    lines = [line for text in DOCS for line in text.splitlines()]
    ours = SentencePieceTokenizer.train(lines, 1200, **options)
    tokenizer_to_hub(ours, tmp_path)
    theirs = hub.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    @given(text=mixed)
    @quick
    def same(text): assert theirs.encode(text).ids == ours.encode(text, "all")
    same()
    for text in ["a" * 500, " " * 300, "==" * 200, *DOCS]: assert theirs.encode(text).ids == ours.encode(text)


# What is not understood

@pytest.mark.parametrize("options, says", [
    ({"model_type": "unigram", "vocab_size": 400}, "not BPE"), ({"byte_fallback": False}, "bytes"), ({"remove_extra_whitespaces": True}, "spaces"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalizes"), ({"user_defined_symbols": ["<x>"]}, "user-defined"),
    ({"treat_whitespace_as_suffix": True}, "spaces")])
def test_a_sentencepiece_model_that_cannot_be_expressed_says_why(tmp_path, options, says):
    pytest.importorskip("sentencepiece")
    size = options.pop("vocab_size", 900)
    ours = SentencePieceTokenizer.train([line for text in DOCS for line in text.splitlines()], size, **options)
    with pytest.raises(ValueError, match=says): tokenizer_to_hub(ours, tmp_path)
    assert not any(tmp_path.iterdir())


BAD = {
    "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "truncation": {"max_length": 5},
    "padding": {"strategy": "BatchLongest"}, "post_processor": {"type": "BertProcessing"},
    "model.type": "WordPiece", "model.dropout": 0.1, "model.end_of_word_suffix": "</w>", "model.news": True,
    "model.ignore_merges": None, "added_tokens.lstrip": True, "added_tokens.single_word": True,
}


@pytest.mark.parametrize("part", BAD)
def test_a_part_that_is_not_understood_is_named(tmp_path, part):
    make_gpt2(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    first, _, second = part.partition(".")
    if part == "model.ignore_merges": data["model"]["merges"] = data["model"]["merges"][1:]       # a token that nothing makes
    elif first == "added_tokens": data[first][0][second] = BAD[part]
    elif second: data[first][second] = BAD[part]
    else: data[first] = BAD[part]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    named = "merges" if part == "model.ignore_merges" else second or first
    with pytest.raises(ValueError, match=named): tokenizer_from_hub(tmp_path)


@pytest.mark.parametrize("steps, named", [
    ([{"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}], "String"),
    ([{"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Removed", "invert": False}], "Removed"),
    ([{"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}], r"\\w"),
    ([{"type": "Split", "pattern": {"Regex": r"a$"}, "behavior": "Isolated", "invert": False}], r"\$"),
    ([{"type": "Split", "pattern": {"Regex": r"[a-z&&[^b]]"}, "behavior": "Isolated", "invert": False}], "&&"),
    ([{"type": "Digits", "individual_digits": False}], "Digits"), ([{"type": "Punctuation", "behavior": "Isolated"}], "Punctuation")])
def test_a_cut_that_is_not_understood_is_named(tmp_path, steps, named):
    make_gpt2(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    spelling = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, spelling]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=named): tokenizer_from_hub(tmp_path)
    data["pre_tokenizer"] = {**spelling, "use_regex": True, "add_prefix_space": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="add_prefix_space"): tokenizer_from_hub(tmp_path)


def test_a_template_with_something_behind_the_text_is_named(tmp_path):
    make_llama2(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="TemplateProcessing"): tokenizer_from_hub(tmp_path)


@pytest.mark.parametrize("change, named", [
    ({"normalizer": {"type": "Prepend", "prepend": "_"}}, "Prepend"), ({"pre_tokenizer": None, "normalizer": None}, "pre_tokenizer"),
    ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": False}}, "Metaspace")])
def test_a_space_mark_that_is_not_understood_is_named(tmp_path, change, named):
    make_llama2(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=named): tokenizer_from_hub(tmp_path)


def test_old_files_are_read(tmp_path):
    "Merges as strings, no type of the model, no use_regex, no ignore_merges, add_prefix_space for prepend_scheme."
    theirs = make_gpt2(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    for name in ("type", "ignore_merges", "byte_fallback"): del data["model"][name]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"): data["model"][name] = ""
    del data["pre_tokenizer"]["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    ours = tokenizer_from_hub(tmp_path)
    assert all(ours.encode(text) == theirs.encode(text).ids for text in DOCS) and ours.pattern == PATTERNS["gpt2"]
    make_mistral(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert (tokenizer_from_hub(tmp_path).front, tokenizer_from_hub(tmp_path).cut) == ("always", True)


def test_missing_files_and_entries_are_clear(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"): tokenizer_from_hub(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="tokenizer.model"): tokenizer_from_hub(tmp_path)
    for text, says in [("{", "whole JSON"), ("{}", "'model'"), ('{"model": {"type": "BPE"}, "added_tokens": []}', "eos_token"),
                       (f'{{"model": {{"type": "BPE", "vocab": {{}}}}, "added_tokens": [{{"content": "{END_OF_TEXT}"}}]}}', "'id'")]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=says): tokenizer_from_hub(tmp_path)


@pytest.mark.parametrize("ours, says", [
    (BPETokenizer.train(["the hen"], 300, pattern=r"\w+|\W"), r"\\w"), (UnigramTokenizer.train(["the hen"] * 9, 300), "gaps"),
    (CharTokenizer("abc", {"a": 7}, eos_token="a"), "both")])
def test_what_the_library_cannot_express_is_named(tmp_path, ours, says):
    if isinstance(ours, UnigramTokenizer): ours = UnigramTokenizer(ours.scores, "gpt2", {END_OF_TEXT: 1000})
    with pytest.raises(ValueError, match=says): tokenizer_to_hub(ours, tmp_path)
    assert not re.findall("json", str(list(tmp_path.iterdir())))
