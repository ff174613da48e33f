"""Models of transformers: saved, loaded, resized and tied by their own library."""

from __future__ import annotations

import copy
import pickle

import amtl
import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

ROWS, IDS = 60, torch.arange(60).view(4, 15)


def build(kind="GPT2LMHeadModel"):
    torch.manual_seed(0)
    if kind == "BertModel":
        config = transformers.BertConfig(
            vocab_size=ROWS,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False
        )
    return getattr(transformers, kind)(config).eval()


def convert(model, bits=None):
    """Whatever `get_input_embeddings` gives is converted, under the name it has."""
    embedding = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is embedding)
    torch.manual_seed(0)
    return amtl.convert(model, {name: torch.arange(ROWS) ** 2}, budget=0.4, bits=bits)


def outputs(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize(("frozen", "bits"), [(False, None), (True, None), (True, "auto")])
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertModel"])
def test_a_model_saves_and_loads_through_its_own_library(tmp_path, kind, frozen, bits):
    model = convert(build(kind), bits)
    full = outputs(amtl.revert(copy.deepcopy(model)))
    if frozen:
        amtl.freeze(model)
    expected = outputs(model)
    assert not torch.equal(expected, full), "masks and rounding must matter"
    model.save_pretrained(tmp_path)
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert type(loaded.get_input_embeddings()) is torch.nn.Embedding
    torch.testing.assert_close(outputs(loaded), expected)
    # As a trainer calls it, and of a copy with values of its own.
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        for table in amtl.table_parameters(twin):
            table.mul_(2)
    twin.save_pretrained(tmp_path / "twin", state_dict=twin.state_dict())
    again = type(model).from_pretrained(tmp_path / "twin")
    torch.testing.assert_close(outputs(again), outputs(twin))
    assert not torch.allclose(outputs(again), expected)


def test_a_checkpoint_resumes_as_a_trainer_does_it(tmp_path):
    """Dense tables in its file, the optimizer's state by tiers."""

    def begin():
        model = amtl.freeze(convert(build("BertModel"), "auto"))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer = begin()
    model(IDS)[0].square().sum().backward()
    optimizer.step()
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    model(IDS)[0].square().sum().backward()
    optimizer.step()
    for found, held in ((model, optimizer), begin()):
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
        found.load_state_dict(state, False)
        held.load_state_dict(saved)
        torch.testing.assert_close(outputs(found), expected)
        held.step()
        amtl.save(found, tmp_path / "small.safetensors")


def test_a_model_within_a_model_saves_itself(tmp_path):
    model = convert(build())
    model.transformer.save_pretrained(tmp_path)
    loaded = transformers.GPT2Model.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(model.transformer))


class Scores(torch.nn.Module, huggingface_hub.PyTorchModelHubMixin):
    def __init__(self, rows=ROWS):
        super().__init__()
        self.tower = torch.nn.Sequential(torch.nn.Embedding(rows, 8), torch.nn.Linear(8, 1))

    def forward(self, ids):
        return self.tower(ids)


class Words(torch.nn.Module):
    """As modules of sentence-transformers are, which save what they hold by themselves."""

    __module__ = "sentence_transformers.stand_in"

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(ROWS, 8)

    def save(self, path):
        safetensors.torch.save_file(self.state_dict(), path)


@pytest.mark.parametrize("frozen", [False, True])
def test_models_of_the_hub_and_of_sentences_save_what_plain_ones_load(tmp_path, frozen):
    """Those of the hub load what has other keys without a word, and stay as they were drawn."""
    model = amtl.convert(Scores(), {"tower.0": torch.arange(ROWS) ** 2}, budget=0.3)
    words = torch.nn.Sequential(Words())
    amtl.convert(words, {"0.embedding": torch.arange(ROWS) ** 2}, budget=0.3)
    if frozen:
        amtl.freeze(model), amtl.freeze(words)
    keys = list(model.state_dict())
    copy.deepcopy(model).eval().save_pretrained(tmp_path / "hub")
    loaded = Scores.from_pretrained(tmp_path / "hub")
    assert type(loaded.tower[0]) is torch.nn.Embedding
    torch.testing.assert_close(loaded(IDS), model.eval()(IDS))
    assert list(model.state_dict()) == keys
    words[0].save(tmp_path / "words")
    state = safetensors.torch.load_file(tmp_path / "words")
    assert list(state) == ["embedding.weight"]
    torch.testing.assert_close(state["embedding.weight"], words[0].embedding.dense_weight())


def test_resizing_is_refused():
    model = convert(build())
    with pytest.raises(TypeError, match="AMTLEmbedding"):
        model.resize_token_embeddings(ROWS + 5)
    amtl.freeze(model)
    with pytest.raises(TypeError, match="AMTLEmbedding"):
        model.resize_token_embeddings(ROWS + 5)
    amtl.revert(model).resize_token_embeddings(ROWS + 5)
    assert model.get_input_embeddings().num_embeddings == ROWS + 5


def test_tied_heads_are_refused_before_and_after():
    tied = transformers.GPT2Config(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(tied)
    with pytest.raises(ValueError, match=r"shared by .*lm_head\.weight"):
        convert(model)
    frozen = amtl.freeze(convert(build()))
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
        frozen.lm_head.weight = frozen.get_input_embeddings().weight
