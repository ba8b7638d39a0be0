"""Weights in and out, against transformers: logits, greedy text, losses and gradients; and files that are not what they say."""
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from minillm import interop
from minillm.checkpoints import save_model
from minillm.interop import (
    FAMILIES,
    config_from_hub,
    config_to_hub,
    from_pretrained,
    model_card,
    open_model,
    save_pretrained,
    stored_views,
    tokenizer_to_hub,
)
from minillm.model import PRESETS, MiniLLM, ModelConfig, continue_ids
from minillm.tokenizer import CharTokenizer

GPT = dict(vocab_size=97, n_positions=96, n_embd=48, n_layer=3, n_head=4)
LLAMA = dict(vocab_size=97, max_position_embeddings=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=80)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
THETA = {"rope_type": "default", "rope_theta": 1e6}
SHAPES = {
    "GPT2": [{}, dict(n_embd=45, n_head=3), dict(n_inner=100), dict(tie_word_embeddings=False),
             dict(activation_function="gelu"), dict(activation_function="relu", n_head=1), dict(n_layer=1, n_embd=49, n_head=7)],
    "Llama": [{}, dict(num_key_value_heads=4, tie_word_embeddings=True), dict(num_key_value_heads=1, head_dim=14),
              dict(head_dim=20, rope_parameters=LLAMA3), dict(head_dim=80, rope_parameters=THETA),
              dict(attention_bias=True, mlp_bias=True), dict(attention_bias=True), dict(rms_norm_eps=1e-3),
              dict(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}),
              dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,     # SmolLM2's
                   rope_parameters={"rope_type": "default", "rope_theta": 1e5})],
    "Mistral": [dict(sliding_window=None), dict(sliding_window=5), dict(sliding_window=7, head_dim=20, num_key_value_heads=1),
                dict(sliding_window=90, head_dim=14, tie_word_embeddings=True), dict(sliding_window=2, num_key_value_heads=4),
                dict(sliding_window=16, head_dim=80, rope_parameters=THETA), dict(hidden_size=50, head_dim=12, sliding_window=None)],
    "Qwen2": [{}, dict(tie_word_embeddings=True, rope_parameters=THETA), dict(num_key_value_heads=1),
              dict(use_sliding_window=True, sliding_window=6, max_window_layers=0), dict(num_key_value_heads=4, head_dim=20),
              dict(use_sliding_window=True, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2,
                   num_hidden_layers=4), dict(hidden_size=56, num_attention_heads=14, head_dim=14)],
    "Qwen3": [dict(head_dim=14), dict(head_dim=20, tie_word_embeddings=True), dict(head_dim=80, rope_parameters=THETA),
              dict(head_dim=12, attention_bias=True), dict(head_dim=16, num_key_value_heads=1),
              dict(head_dim=12, use_sliding_window=True, sliding_window=6, max_window_layers=0), dict(hidden_size=50)],
}
ALL = [pytest.param(kind, number, id=f"{kind}-{number}") for kind, shapes in SHAPES.items() for number in range(len(shapes))]


@pytest.fixture(scope="session")
def transformers(): return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def pair(transformers, tmp_path_factory):
    "A random model of transformers whose weights are large enough for mistakes to show, its folder, and ours from there."
    @cache
    def make(kind: str, number: int):
        torch.manual_seed(number)
        config = getattr(transformers, f"{kind}Config")(**(GPT if kind == "GPT2" else LLAMA) | SHAPES[kind][number])
        model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
        enlarge(model)
        folder = tmp_path_factory.mktemp(f"{kind}{number}")
        model.save_pretrained(folder)
        return model, folder, load(folder)
    return make


def enlarge(model) -> None:
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.2)


def load(folder, **options) -> MiniLLM:
    "Our model of a folder that has no tokenizer."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return from_pretrained(folder, device="cpu", **options)[0]


def apart(a: torch.Tensor, b: torch.Tensor) -> float: return (a - b).abs().max().item()


# -- against transformers --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind, number", ALL)
def test_logits_are_those_of_transformers(pair, kind, number):
    theirs, _, ours = pair(kind, number)
    for length in (1, 40, 96):
        ids = torch.randint(0, 97, (2, length))
        wanted = theirs(ids).logits
        assert wanted.std() > 0.1, "a flat answer would show no mistake"
        assert apart(ours(ids), wanted) < 1e-4


@pytest.mark.parametrize("kind, number", ALL)
def test_greedy_text_with_a_cache_is_theirs_with_theirs(pair, kind, number):
    theirs, _, ours = pair(kind, number)
    ids = torch.randint(0, 97, (2, 9))
    settings = dict(do_sample=False, max_new_tokens=64, min_new_tokens=64, use_cache=True, pad_token_id=0)
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    # min_new_tokens forbids their end token: so does this
    def choose(logits):
        for end in {theirs.generation_config.eos_token_id} - {None}:
            if end < 97: logits[:, end] = -torch.inf
        return logits.argmax(-1, keepdim=True)
    assert torch.equal(continue_ids(ours, ids, 64, choose), wanted)


def test_a_window_of_one_token_is_as_theirs_without_a_cache(transformers, tmp_path):
    "With one, transformers 5 keeps [-window + 1:], which for a window of 1 is everything."
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=1)).eval()
    enlarge(theirs)
    theirs.save_pretrained(tmp_path)
    ours, ids = load(tmp_path), torch.randint(0, 97, (2, 9))
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, use_cache=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(continue_ids(ours, ids, 30, lambda logits: logits.argmax(-1, keepdim=True)), wanted)


@pytest.mark.parametrize("kind, number", ALL)
def test_loss_and_gradients_after_a_step_are_theirs(pair, tmp_path, kind, number):
    theirs, folder, _ = pair(kind, number)
    theirs = type(theirs).from_pretrained(folder).eval()
    ours, ids = load(folder), torch.randint(0, 97, (2, 30))
    for model, logits in ((theirs, lambda: theirs(ids).logits), (ours, lambda: ours(ids))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            if step == 0: optimizer.step()
        model.last = loss.item()
    assert ours.last == pytest.approx(theirs.last, rel=1e-3)
    with torch.no_grad():
        for p in ours.parameters(): p.copy_(p.grad)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    found = stored_views(ours, family_of(kind))
    assert found.keys() == wanted.keys()
    for name, parts in found.items():
        torch.testing.assert_close(torch.cat(parts, -1), wanted[name], rtol=1e-3, atol=1e-3 * wanted[name].abs().max().item())


def family_of(kind: str): return FAMILIES[kind.lower()]


@pytest.mark.parametrize("kind", SHAPES)
def test_shards_half_precision_and_files_of_the_bare_model(pair, tmp_path, kind):
    theirs, folder, ours = pair(kind, 1)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same_weights(load(tmp_path / "shards"), ours)
    half = type(theirs).from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    kept = load(tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    exact = load(tmp_path / "half")
    assert exact.embedding.weight.dtype == torch.float32 and torch.equal(exact.embedding.weight, kept.embedding.weight.float())
    if ours.config.tie_embeddings:
        type(theirs).from_pretrained(folder).base_model.save_pretrained(tmp_path / "bare")
        same_weights(load(tmp_path / "bare"), ours)


def same_weights(a: MiniLLM, b: MiniLLM) -> None:
    assert a.config == b.config
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True): assert torch.equal(p, q), name


def test_configs_as_they_are_published_are_the_presets():
    "Fields as the hub has them for these models (those of other versions of transformers among them)."
    common = dict(bos_token_id=1, eos_token_id=2, hidden_act="silu", initializer_range=0.02, torch_dtype="bfloat16",
                  transformers_version="4.40.0", use_cache=True, attention_dropout=0.0, rope_scaling=None)
    published = {
        "gpt2": dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1,
                     resid_pdrop=0.1, layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024,
                     summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
                     summary_use_proj=True, task_specific_params={"text-generation": {"do_sample": True}}, vocab_size=50257,
                     initializer_range=0.02, bos_token_id=50256, eos_token_id=50256),
        "smollm2-135m": dict(common, model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, hidden_size=576,
                             intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192, num_attention_heads=9,
                             num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False,
                             rope_theta=100000, tie_word_embeddings=True, vocab_size=49152),
        "llama-3.2-1b": dict(common, model_type="llama", attention_bias=False, head_dim=64, hidden_size=2048, intermediate_size=8192,
                             max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32, num_hidden_layers=16,
                             num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=128256,
                             tie_word_embeddings=True, rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                                                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}),
        "llama-2-7b": dict(common, model_type="llama", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
                           num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-5,
                           tie_word_embeddings=False, vocab_size=32000),
        "mistral-7b": dict(common, model_type="mistral", hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
                           num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=10000.0,
                           sliding_window=4096, tie_word_embeddings=False, vocab_size=32000),
        "qwen2.5-0.5b": dict(common, model_type="qwen2", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768,
                             max_window_layers=24, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-6,
                             rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, use_mrope=False,
                             use_sliding_window=False, vocab_size=151936),
        "qwen3-0.6b": dict(common, model_type="qwen3", attention_bias=False, head_dim=128, hidden_size=1024, intermediate_size=3072,
                           max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16, num_hidden_layers=28,
                           num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
                           use_sliding_window=False, vocab_size=151936),
    }
    for name, fields in published.items():
        wanted = PRESETS[name].replace(dropout=0.1) if name == "gpt2" else PRESETS[name]
        assert config_from_hub(fields) == wanted, name


# -- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch, warnings
from minillm.interop import from_pretrained
from minillm.model import MiniLLM
warnings.simplefilter("ignore")
page = resource.getpagesize()
with torch.device("meta"): MiniLLM.from_preset("gpt2")    # its first use loads 70 MB of torch, whatever the model
before = int(open("/proc/self/statm").read().split()[1]) * page
model, _ = from_pretrained(sys.argv[1], device="cpu")
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
weights = sum(p.nbytes for p in model.parameters())
print((peak - before) / weights, weights)
"""

@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is measured by /proc")
@pytest.mark.parametrize("kind, size", [("gpt2", dict(n_embd=768, n_layer=5, n_head=12, n_positions=64, vocab_size=20000)),
                                        ("llama", dict(hidden_size=768, num_hidden_layers=4, intermediate_size=2048, vocab_size=28000,
                                                       num_attention_heads=12, max_position_embeddings=64, tie_word_embeddings=True))])
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, kind, size):
    fields = dict(model_type=kind, **size)
    with torch.device("meta"): model = MiniLLM(config_from_hub(fields))
    save_file({name: torch.zeros((*parts[0].shape[:-1], sum(p.shape[-1] for p in parts)))
               for name, parts in stored_views(model, FAMILIES[kind]).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    ratio, weights = map(float, done.stdout.split())
    assert weights > 190e6 and ratio <= 1.2, done.stdout


# -- what stands in the way ------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path):
    "A small checkpoint in Hugging Face's format, to be damaged: its folder."
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=31, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=24, tie_embeddings=False)
    save_pretrained(MiniLLM(config), None, tmp_path / "stranger")
    return tmp_path / "stranger"


def change(folder, **fields) -> None:
    "Sets fields of a folder's config.json; ... removes one."
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize("fields, wanted", [
    (dict(model_type="lama"), "'lama' is no model_type that minillm knows; the nearest is 'llama'"),
    (dict(model_type=...), "no field 'model_type'"),
    (dict(architectures=["LlamaForSequenceClassification"]), "architectures = .* is no language model of this family"),
    (dict(logit_scale=2.0), "the field logit_scale = 2.0 is not understood"),
    (dict(final_logit_softcapping=None), "the field final_logit_softcapping = None is not understood"),
    (dict(quantization_config={"bits": 4}), "quantization_config = .* is not supported; only None is"),
    (dict(auto_map={"AutoModel": "x.py"}), "auto_map = .* is not supported"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
    (dict(sliding_window=8), "sliding_window = 8 is not supported; only None is"),
    (dict(hidden_size=...), "lacks the field 'hidden_size', which says d_model"),
    (dict(rms_norm_eps=None), "'rms_norm_eps', which says norm_eps, is null"),
    (dict(hidden_size="16"), "d_model"),
    (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
    (dict(mlp_bias=True), r"attention_bias, mlp_bias = \(False, True\) is not supported"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn' is no kind of rope_scaling"),
    (dict(rope_scaling={"type": "linear", "factor": 4.0, "beta": 1}), "beta is missing or not understood"),
    (dict(rope_scaling={"type": "llama3", "factor": 4.0}), "high_freq_factor, low_freq_factor is missing"),
    (dict(num_key_value_heads=3), "n_kv_heads = 3"),
    (dict(rope_theta=0), "rope_theta = 0 must be a number above 0"),
    (dict(rope_theta=0, rope_scaling={"type": "linear", "factor": 2.0, "rope_theta": None}), "rope_theta = 0 must be"),
    (dict(rope_theta="10000"), "rope_theta = '10000' must be a number above 0"),
    (dict(rope_scaling={"type": "linear", "factor": "2"}), "factor = '2' must be a number above 0"),
    (dict(rope_scaling={"type": "linear", "factor": 0}), "factor = 0 must be a number above 0"),
    (dict(rope_scaling={"type": "linear", "factor": float("inf")}), "factor = inf must be a number above 0"),
    (dict(rope_scaling={"type": "linear", "factor": True}), "factor = True must be a number above 0"),
    (dict(rope_scaling={"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}), "high_freq_factor = 1.0 must be above low"),
])
def test_a_field_that_is_not_understood_is_an_error_that_names_it(stranger, fields, wanted):
    change(stranger, **fields)
    with pytest.raises(ValueError, match=f"config.json.*{wanted}"): from_pretrained(stranger)


def test_windows_in_an_order_of_their_own_are_an_error():
    fields = dict(model_type="qwen3", vocab_size=9, max_position_embeddings=9, hidden_size=8, num_hidden_layers=4, num_attention_heads=2,
                  num_key_value_heads=1, intermediate_size=8, head_dim=4, use_sliding_window=True, sliding_window=3)
    assert config_from_hub(dict(fields, max_window_layers=4)).window is None
    assert config_from_hub(dict(fields, max_window_layers=0)).windows == [3] * 4
    assert config_from_hub(dict(fields, layer_types=["sliding_attention"] * 3 + ["full_attention"])).windows == [3, 3, 3, None]
    with pytest.raises(ValueError, match="layer_types = .*max_window_layers = 2"): config_from_hub(dict(fields, max_window_layers=2))


def test_dropout_that_differs_by_place_is_left_out_with_a_warning():
    fields = dict(model_type="gpt2", vocab_size=9, n_positions=9, n_embd=8, n_layer=1, n_head=2)
    assert config_from_hub(fields).dropout == 0.1
    for value in (0.2, 0.0):
        with pytest.warns(UserWarning, match="attn_pdrop.*in training only"): assert config_from_hub(dict(fields, attn_pdrop=value)).dropout == 0.1


def rewrite(file, header: dict | None = None, cut: int = 0) -> None:
    "Changes the header of a safetensors file (the entries of some tensors), or cuts bytes from its end."
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:8 + length])
    for name, entry in (header or {}).items(): entries[name] = entries[name] | entry
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length:len(raw) - cut])


NORM, HEAD = "model.norm.weight", "lm_head.weight"

@pytest.mark.parametrize("damage, wanted", [
    (lambda file: rewrite(file, cut=100), "model.safetensors has .* bytes, its tensors take .*: it was cut off"),
    (lambda file: file.write_bytes(file.read_bytes()[:50]), "cut off at 50 bytes"),
    (lambda file: file.write_bytes(b""), "cut off at 0 bytes"),
    (lambda file: file.write_bytes(b"<html>" + b"x" * 500), "no whole safetensors file"),
    (lambda file: file.write_bytes((20).to_bytes(8, "little") + b"no JSON at all" * 9), "a header that is no JSON"),
    (lambda file: file.write_bytes((90000).to_bytes(8, "little") + b"[" * 90000), "a header that is no JSON"),
    (lambda file: rewrite(file, {NORM: {"shape": [float("inf")]}}), "describes no tensors"),
    (lambda file: rewrite(file, {NORM: {"dtype": "BOOL"}}), "'model.norm.weight' is stored as BOOL"),
    (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"), "a header that names no tensors"),
    (lambda file: file.write_bytes((9).to_bytes(8, "little") + b'{"a": {}}'), "describes no tensors"),
    (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"{}" + b"x" * 9), "the last tensor is 'none'"),
    (lambda file: rewrite(file, {NORM: {"data_offsets": [1, 2, 3]}}), "describes no tensors"),
    (lambda file: rewrite(file, {NORM: {"shape": [-4, -4]}}), "'model.norm.weight' of shape .* cannot stand at"),
    (lambda file: torch.save({"x": torch.ones(3)}, file), "a pickle, which could run a program"),
    (lambda file: file.write_bytes(pickle.dumps({"x": 1})), "a pickle, which could run a program"),
    (lambda file: rewrite(file, {NORM: {"dtype": "F8_E4M3"}}), "'model.norm.weight' is stored as F8_E4M3"),
    (lambda file: rewrite(file, {NORM: {"dtype": "BF16"}}), "'model.norm.weight' of shape .* cannot stand at"),
    (lambda file: rewrite(file, {NORM: {"shape": [99]}}), "'model.norm.weight' of shape .* cannot stand at"),
    (lambda file: rewrite(file, {NORM: {"shape": [4, 4]}}), r"'model.norm.weight' has the shape \(4, 4\), and by config.json"),
    (lambda file: rewrite(file, {HEAD: {"shape": [16, 31]}}), r"'lm_head.weight' has the shape \(16, 31\)"),
    (lambda file: save_file({"x": torch.ones(3), **load_file(file)}, file), "no place for the tensor 'x'"),
    (lambda file: save_file({k: v for k, v in load_file(file).items() if k != NORM}, file), "lacks the tensor 'model.norm.weight'"),
])
def test_a_file_that_is_not_what_it_says_is_named_with_the_tensor(stranger, damage, wanted):
    damage(stranger / "model.safetensors")
    with pytest.raises(ValueError, match=f"stranger.*{wanted}"): from_pretrained(stranger)


def in_shards(folder) -> dict:
    "The weights of a folder in two files; gives their index."
    tensors = load_file(folder / "model.safetensors")
    index = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(index.values()): save_file({k: v for k, v in tensors.items() if index[k] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_shards_and_their_index_must_agree(stranger):
    whole = load(stranger)
    index, file = in_shards(stranger), stranger / "model.safetensors.index.json"
    same_weights(load(stranger), whole)
    for changed, wanted in [({NORM: "model-00009-of-00002.safetensors"}, "model-00009-of-00002.safetensors.*'model.norm.weight', is missing"),
                            ({NORM: "../other.safetensors"}, "no safetensors file of this folder"),
                            ({NORM: "model.bin"}, "no safetensors file of this folder"),
                            ({"strange": index[NORM]}, "do not agree on where the tensor 'strange' is"),
                            ({NORM: next(f for f in index.values() if f != index[NORM])}, "do not agree on where .*'model.norm.weight'")]:
        file.write_text(json.dumps({"weight_map": index | changed}))
        with pytest.raises((ValueError, FileNotFoundError), match=wanted): from_pretrained(stranger)
    file.write_text('{"weight_map": {"a"')
    with pytest.raises(ValueError, match="index.json is not whole JSON"): from_pretrained(stranger)
    file.write_text(json.dumps({"weight_map": index}))
    (stranger / index[NORM]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{index[NORM]}, which holds '.*', is missing"): from_pretrained(stranger)


class Loud:
    def __reduce__(self): return print, ("a pickle was opened",)


def test_a_pickle_checkpoint_is_named_and_never_opened(stranger, capsys):
    (stranger / "model.safetensors").unlink()
    (stranger / "pytorch_model.bin").write_bytes(pickle.dumps(Loud()))
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*; pytorch_model.bin may run code.*never read"):
        from_pretrained(stranger)
    assert not capsys.readouterr().out


def test_a_tied_head_that_differs_is_an_error_and_one_that_does_not_is_none(stranger):
    change(stranger, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'model.embed_tokens.weight', though config.json ties them"):
        from_pretrained(stranger)
    tensors = load_file(stranger / "model.safetensors")
    save_file({**tensors, HEAD: tensors["model.embed_tokens.weight"].clone()}, stranger / "model.safetensors")
    model = load(stranger)
    assert model.head.weight is model.embedding.weight


def test_a_tied_head_of_another_shape_is_an_error(stranger):
    change(stranger, tie_word_embeddings=True)
    tensors = load_file(stranger / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for part in (embedding[:10], embedding[:0], embedding[:, :0], embedding[None], embedding[0, 0], embedding[:, :5], embedding.T):
        save_file({**tensors, HEAD: part.clone().contiguous()}, stranger / "model.safetensors")
        shape = re.escape(str(tuple(part.shape)))
        with pytest.raises(ValueError, match=rf"model.safetensors: the tensor 'lm_head.weight' has the shape {shape}, .* \(31, 16\)"):
            from_pretrained(stranger)


def test_a_json_file_without_fields_is_named(stranger):
    config = (stranger / "config.json").read_text()
    for text in ("5", "[1]", "null", "[" * 90000):
        (stranger / "config.json").write_text(text)
        for opened in (from_pretrained, open_model):
            with pytest.raises(ValueError, match="stranger/config.json (holds no fields|is nested too deeply)"): opened(stranger)
    (stranger / "config.json").write_text(config)
    (stranger / "tokenizer.json").write_text("5")
    with pytest.raises(ValueError, match="stranger/tokenizer.json holds no fields"): from_pretrained(stranger)
    (stranger / "tokenizer.json").unlink()
    in_shards(stranger)
    (stranger / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(ValueError, match="index.json holds no fields"): from_pretrained(stranger)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_a_mask_that_old_files_carry_may_have_any_type(tmp_path, dtype):
    config = BASE.replace(**GPTS)
    save_pretrained(MiniLLM(config), None, tmp_path / "old")
    file = tmp_path / "old/model.safetensors"
    whole = load(tmp_path / "old")
    save_file({**load_file(file), "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).to(dtype)}, file)
    same_weights(load(tmp_path / "old"), whole)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_an_error(tmp_path, stranger):
    letters, says = CharTokenizer("".join(map(chr, range(97, 160)))), "the tokenizer has 64 ids, the model 31"
    with pytest.raises(ValueError, match=f"no: {says}"): save_pretrained(load(stranger), letters, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    tokenizer_to_hub(letters, stranger)
    with pytest.raises(ValueError, match=f"stranger: {says}"): from_pretrained(stranger)
    (stranger / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="tokenizer_config.json holds no fields"): from_pretrained(stranger)


def test_a_folder_of_ours_or_of_nothing_is_no_checkpoint_of_the_hub(tmp_path, stranger):
    with pytest.raises(FileNotFoundError, match="no folder with a config.json"): from_pretrained(tmp_path)
    save_model(tmp_path / "own", load(stranger))
    with pytest.raises(ValueError, match="a model of the course, which minillm.load opens"): from_pretrained(tmp_path / "own")


def test_loading_draws_no_random_numbers(stranger):
    before = torch.get_rng_state()
    load(stranger)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_tokenizer_files_the_model_comes_with_a_warning(stranger):
    with pytest.warns(UserWarning, match="without a tokenizer: .*stranger has no tokenizer.json$"): model, tokenizer = from_pretrained(stranger)
    assert tokenizer is None and not model.training
    (stranger / "tokenizer.model").write_bytes(b"")
    with pytest.warns(UserWarning, match="no tokenizer.json, only tokenizer.model: AutoTokenizer"): from_pretrained(stranger)


# -- weights out -----------------------------------------------------------------------------------------------------

BASE = ModelConfig(vocab_size=61, context_length=32, d_model=32, n_layers=4, n_heads=4, d_ff=48)
GPTS = dict(position="learned", norm="layernorm", bias=True, activation="gelu_tanh")
SCALED = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 16}
OURS = {
    "gpt2": dict(GPTS, dropout=0.2), "gpt2, gelu, untied": dict(GPTS, activation="gelu", tie_embeddings=False),
    "llama": dict(), "llama, grouped, untied": dict(n_kv_heads=2, tie_embeddings=False), "llama, wide": dict(head_dim=14),
    "llama, biases": dict(bias=True), "llama, attention biases": dict(bias="attention"), "llama, scaled": dict(rope_scaling=SCALED),
    "llama, linear": dict(rope_scaling={"kind": "linear", "factor": 2.0}, rope_theta=5e5), "mistral": dict(window=5),
    "mistral, odd": dict(d_model=30, head_dim=8), "qwen2": dict(bias="qkv"), "qwen2, window": dict(bias="qkv", window=5, global_every=2),
    "qwen3": dict(qk_norm=True), "qwen3, biases": dict(qk_norm=True, bias="attention", n_kv_heads=2, tie_embeddings=False),
    "qwen3, window": dict(qk_norm=True, window=5, global_every=4), "qwen3, all windows": dict(qk_norm=True, window=5),
}


@torch.no_grad()
@pytest.mark.parametrize("changes", OURS.values(), ids=OURS)
def test_transformers_opens_what_we_save_and_it_comes_back_unchanged(transformers, tmp_path, changes):
    model = MiniLLM(BASE.replace(**changes)).eval()
    enlarge(model)
    save_pretrained(model, None, tmp_path / "saved")
    assert {f.name for f in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(0, 61, (2, 32))
    assert apart(theirs.eval()(ids).logits, model(ids)) < 1e-4
    same_weights(load(tmp_path / "saved"), model)
    theirs.save_pretrained(tmp_path / "again")
    same_weights(load(tmp_path / "again"), model)


@pytest.mark.parametrize("changes, wanted", [
    (dict(position="alibi"), "in the way of LlamaForCausalLM, the nearest: position = 'alibi'"),
    (dict(window=8, sinks=2), "MistralForCausalLM, the nearest: sinks = 2"), (dict(prefix=3), "prefix = 3"),
    (dict(norm="layernorm"), "norm = 'layernorm'"), (dict(n_experts=2, n_active_experts=1), "n_experts = 2; n_active_experts = 1"),
    (dict(norm_position="post"), "norm_position = 'post'"), (dict(GPTS, n_kv_heads=2), "GPT2LMHeadModel, the nearest: n_kv_heads = 2"),
    (dict(GPTS, head_dim=6), "head_dim = 6"), (dict(window=8, global_every=2), "global_every = 2"),
    (dict(activation="gelu"), "activation = 'gelu'"), (dict(GPTS, qk_norm=True), "qk_norm = True"), (dict(bias=True, window=8), "window = 8|bias = True"),
])
def test_what_no_class_holds_is_an_error_that_says_why(tmp_path, changes, wanted):
    with pytest.raises(ValueError, match=wanted): save_pretrained(MiniLLM(BASE.replace(**changes)), None, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("small-4b", "small-20m", "mini-sinusoidal")])
def test_presets_travel_as_they_are(name):
    config = PRESETS[name].replace(dropout=0.0)
    assert config_from_hub(json.loads(json.dumps(config_to_hub(config)))) == config


def test_dtype_card_and_generation_settings(tmp_path):
    model, tokenizer, info = open_model("tales-short", "cpu")
    save_pretrained(model, tokenizer, tmp_path / "my-tales", dtype=torch.bfloat16, info=info)
    stored = load_file(tmp_path / "my-tales/model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "my-tales/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["bos_token_id"] == config["eos_token_id"] == tokenizer.eos_id
    assert json.loads((tmp_path / "my-tales/generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    card = (tmp_path / "my-tales/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n") and "# my-tales" in card and f"{model.num_parameters():,} parameters" in card
    assert "`tales-short`: tales that a program tells" in card and "/work" not in card and str(tmp_path) not in card
    assert all(f"## {part}" in card for part in ("Trained on", "Figures", "Use", "Limits", "Licence"))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_program_on_the_card_runs_as_it_stands(transformers, tmp_path, monkeypatch, capsys, with_tokenizer):
    model, tokenizer, info = open_model("tales-short", "cpu")
    save_pretrained(model, tokenizer if with_tokenizer else None, tmp_path / "my-tales", info=info)
    [program] = re.findall("```python\n(.*?)```", (tmp_path / "my-tales/README.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "card", "exec"), {})
    if with_tokenizer: assert "Once upon a time" in capsys.readouterr().out


def test_the_card_of_others_weights_says_whose_they_are_and_no_more(tmp_path, stranger):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, info = open_model(stranger, "cpu")
    card = model_card(model, None, "again", info)
    assert "license: unknown" in card and "The weights are those of `stranger`" in card and "Those of `stranger`." in card
    assert str(tmp_path) not in card and "It was trained with" not in card
    assert "license: apache-2.0" in model_card(model, None, "again", info, "apache-2.0")
    further = model_card(model, None, "mine", {"data": "pydocs", "init_from": "HuggingFaceTB/SmolLM2-135M"})
    assert "license: unknown" in further and "It did not start from nothing, but from `HuggingFaceTB/SmolLM2-135M`." in further
    assert "from `tales-2`" in model_card(model, None, "mine", {"init_from": str(tmp_path / "tales-2")})


def test_only_an_earlier_export_is_replaced(tmp_path, stranger):
    model = load(stranger)
    save_pretrained(model, None, stranger)
    same_weights(load(stranger), model)
    (stranger / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things than an exported model"): save_pretrained(model, None, stranger)
    assert (stranger / "notes.txt").read_text() == "mine"


# -- finding out what was given --------------------------------------------------------------------------------------


def test_open_model_takes_whatever_is_given(tmp_path, stranger):
    ours = load(stranger)
    save_model(tmp_path / "own", ours)
    for given in (stranger, str(stranger), tmp_path / "own"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, _, info = open_model(given, "cpu")
        same_weights(model, ours)
        assert info["weights"]
    assert open_model("tales-short", "cpu")[2]["data"] == "tales-short"
    with pytest.raises(FileNotFoundError, match="neither a folder nor a packaged model.*on the Hugging Face hub a model is called OWNER/NAME"): open_model("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder without a finished checkpoint; packaged are: [^/]*$"): open_model(tmp_path / "empty")


def test_a_hub_id_is_no_path():
    assert interop.is_hub_id("HuggingFaceTB/SmolLM2-135M") and not interop.is_hub_id("tales-short")
    assert not interop.is_hub_id("tests/nothing") and not interop.is_hub_id("a/b/c"), "the folder tests is here"


OFFLINE = """
import sys, time
if sys.argv[1] == "imported": import huggingface_hub
from minillm.interop import from_pretrained
start = time.monotonic()
try: from_pretrained("owner/some-model")
except ValueError as error: print(error)
print(time.monotonic() - start)
"""

@pytest.mark.parametrize("before", ["fresh", "imported"])
def test_without_a_network_a_hub_id_fails_within_seconds_and_names_what_there_is(tmp_path, before):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", OFFLINE, before], capture_output=True, text=True, env=environment, cwd=tmp_path)
    said, seconds = done.stdout.splitlines()
    assert "'owner/some-model' is no folder here, and the Hugging Face hub does not answer" in said and "tales-short" in said
    assert float(seconds) < 15


def test_what_the_hub_gives_is_fetched_in_two_goes(stranger, monkeypatch):
    "First what is small, and only if we hold such a model, the weights."
    asked = []
    def fetch(hub_id, patterns):
        asked.append(list(patterns))
        return stranger
    monkeypatch.setattr(interop, "fetch", fetch)
    load("owner/stranger")
    assert "config.json" in asked[0] and not any(name.endswith(".safetensors") for name in asked[0])
    assert asked[-1][-1] == "model.safetensors"
    change(stranger, model_type="bloom")
    asked.clear()
    with pytest.raises(ValueError, match="bloom"): from_pretrained("owner/stranger")
    assert not any(name.endswith(".safetensors") for names in asked for name in names)
