from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.errors import UserError
from amtl.run import methods
from amtl.run.config import OWN, TrainConfig
from amtl.run.metrics import auc, auc_error, calming, log_loss, score, score_error
from amtl.run.model import ClickModel, dropout, predict
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score


@pytest.fixture(params=["single", "bags"])
def encoded(request):
    rng = np.random.default_rng(0)
    n = 300
    frame = pl.DataFrame(
        {
            "user": rng.zipf(1.5, n) % 40,
            "item": rng.zipf(1.5, n) % 25,
            "price": rng.normal(size=n),
            "tags": [["a|b", "b|c", "c", ""][i] for i in rng.integers(0, 4, n)],
        }
    )
    names = ["user", "item", "price"] + (["tags"] if request.param == "bags" else [])
    specs = infer_fields(frame, names, default_numeric="standardise")
    encoder = Encoder.fit(frame, specs)
    return encoder, encoder.transform(frame)


@pytest.mark.parametrize("n", [2, 10, 1000])
@pytest.mark.parametrize("distinct", [2, 7, 10_000])
def test_auc_and_log_loss_equal_the_textbook(n, distinct):
    rng = np.random.default_rng(n + distinct)
    labels = rng.integers(0, 2, n)
    labels[:2] = [0, 1]
    scores = rng.integers(0, distinct, n) / distinct * 4 - 2
    assert auc(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(
        roc_auc_score(labels, scores), abs=1e-12
    )
    expected = sklearn_log_loss(labels, 1 / (1 + np.exp(-scores)))
    assert log_loss(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(expected)


def test_auc_of_one_class_is_nan():
    assert np.isnan(auc(torch.rand(5), torch.ones(5)))
    assert np.isnan(auc_error(torch.rand(5), torch.ones(5)))
    assert np.isnan(auc_error(torch.rand(5), torch.tensor([0, 0, 0, 0, 1])))


@pytest.mark.parametrize(("positives", "distinct"), [(60, 10_000), (150, 6), (12, 10_000)])
def test_error_of_the_auc_is_that_of_a_bootstrap(positives, distinct):
    generator = torch.Generator().manual_seed(positives)
    labels = (torch.arange(300) < positives).float()
    scores = torch.randn(300, generator=generator) + labels
    scores = (scores * distinct / 6).round()
    areas = []
    for _ in range(4000):
        of_positives = torch.randint(positives, (positives,), generator=generator)
        of_negatives = torch.randint(positives, 300, (300 - positives,), generator=generator)
        drawn = torch.cat([of_positives, of_negatives])
        areas.append(auc(scores[drawn], labels[drawn]))
    # A standard deviation of 4000 is off by 1.1 %; a bootstrap of n takes 1 / n, not 1 / (n - 1).
    expected = np.std(areas) * (positives / (positives - 1)) ** 0.5
    mixed = torch.randperm(300, generator=generator)
    assert auc_error(scores[mixed], labels[mixed]) == pytest.approx(expected, rel=0.04)


def test_the_score_counts_log_loss_over_what_guessing_costs():
    coin = torch.tensor([0.0, 1.0] * 4)
    assert score(0.75, 0.5, coin) == pytest.approx(0.25)
    for clicks in (1, 20, 500):
        labels = (torch.arange(1000) < clicks).float()
        guess = log_loss(torch.logit(labels.mean()).expand(1000), labels)
        assert score(0.5, guess, labels) == pytest.approx(0.5 - np.log(2), abs=1e-5)
    assert score(0.5, 0.125, torch.ones(3)) == 0.375


@pytest.mark.parametrize("positives", [60, 150, 12])
def test_error_of_a_difference_is_that_of_a_bootstrap(positives):
    """Of two models that agree more than they err, so that most of it cancels."""
    generator = torch.Generator().manual_seed(positives)
    labels = (torch.arange(300) < positives).float()
    common = torch.randn(300, generator=generator) + labels
    models = [common + 0.4 * torch.randn(300, generator=generator) for _ in range(2)]

    def lead(rows):
        said, told = [model[rows] for model in models], labels[rows]
        first, second = (score(auc(x, told), log_loss(x, told), told) for x in said)
        return first - second

    leads = []
    for _ in range(3000):
        of_positives = torch.randint(positives, (positives,), generator=generator)
        of_negatives = torch.randint(positives, 300, (300 - positives,), generator=generator)
        leads.append(lead(torch.cat([of_positives, of_negatives])))
    expected = np.std(leads) * (positives / (positives - 1)) ** 0.5
    found = score_error(*models, labels)
    assert found == pytest.approx(expected, rel=0.08)
    assert score_error(models[0], models[0], labels) == 0.0
    assert np.isnan(score_error(*models, (torch.arange(300) < 1).float()))


def test_logits_that_are_too_sure_are_made_smaller():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, generator=generator)
    labels = (torch.rand(4000, generator=generator) < torch.sigmoid(logits)).float()
    for sure in (2, 4):
        assert calming(sure * logits, labels) == pytest.approx(1 / sure, rel=0.07)
    for unsure in (0.5, 1):
        assert calming(unsure * logits, labels) == 1.0
    # What holds the wrong way round keeps its order, and a gain by chance proves nothing.
    assert calming(-logits, labels) == pytest.approx(0.1)
    assert calming(1.05 * logits[:400], labels[:400]) == 1.0


def test_few_rows_in_perfect_order_are_no_proof_of_certainty():
    labels = (torch.arange(40) < 12).float()
    logits = 20 * (2 * labels - 1)
    said = torch.sigmoid(calming(logits, labels) * logits)
    # As sure as 12 and 28 rows allow, each class with one more of either label.
    assert 13 / 14 < said[0] < 29 / 30
    assert calming(0.1 * logits, labels) == 1.0
    many = labels.repeat(5)
    assert calming(logits.repeat(5), many) == 1.0


@pytest.mark.parametrize("dim", [1, 3, 8])
@pytest.mark.parametrize("method", OWN)
def test_one_lookup_equals_a_lookup_per_field(encoded, method, dim):
    encoder, data = encoded
    table = methods.build_table(method, encoder, dim, budget=1.0, seed=1)
    model = ClickModel(table, len(encoder.fields), dim, 1, [4])
    weight = methods.table_parameters(table)[0].detach()
    if methods.is_adaptive(table):
        columns = torch.arange(dim)
        weight = weight * (columns < table.row_dims()[:, None])
    batch = data.batch(torch.arange(20))
    parts = [weight[data.rows[:20, f].long()] for f in range(data.rows.shape[1])]
    for bag in data.bags:
        means = []
        for code in bag.codes[:20].tolist():
            rows = bag.values[bag.offsets[code] : bag.offsets[code + 1]].long()
            means.append(weight[rows].mean(0) if len(rows) else torch.zeros(dim))
        parts.append(torch.stack(means))
    inputs = torch.cat([*parts, data.dense[:20]], 1)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch), model.mlp(inputs).squeeze(1))


def test_predict_covers_every_sample_and_restores_the_mode(encoded):
    encoder, data = encoded
    table = methods.build_table("fixed", encoder, 4)
    model = ClickModel(table, len(encoder.fields), 4, 1)
    model.train()
    logits = predict(model, data, batch_size=70)
    assert logits.shape == (len(data),)
    assert model.training
    torch.testing.assert_close(logits, predict(model, data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.999])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share, dtype):
    torch.manual_seed(0)
    n = 1_000_003
    values = torch.ones(n, dtype=dtype, requires_grad=True)
    dropped = dropout(values, share)
    zeros = int((dropped == 0).sum())
    assert abs(zeros - n * share) <= 5 * (n * share * (1 - share)) ** 0.5 + n / 2**16
    kept = dropped[dropped != 0].double()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - share)), rtol=0.02, atol=0)
    dropped.float().sum().backward()
    assert torch.equal(values.grad, dropped.detach())


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 3), (5, 2, 3)])
def test_dropout_of_any_shape_follows_the_seed(shape):
    values = torch.rand(shape) + 1
    torch.manual_seed(1)
    first = dropout(values, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(values, 0.5))
    assert first.shape == values.shape


def test_dropout_falls_on_values_alike_and_independently():
    torch.manual_seed(0)
    zeros = (dropout(torch.ones(1_000_000), 0.3) == 0).double()
    assert (zeros.view(-1, 4).mean(0) - 0.3).abs().max() < 0.005
    for distance in range(1, 9):
        both = zeros[distance:] * zeros[:-distance]
        assert abs(float(both.mean()) - 0.09) < 0.003, distance


def test_embeddings_drop_out_in_training_only(encoded):
    encoder, data = encoded
    table = methods.build_table("fixed", encoder, 4, init_std=1.0)
    batch = data.batch(torch.arange(100))
    dense = batch.dense.shape[1]
    assert dense == 1
    model = ClickModel(table, len(encoder.fields), 4, dense, [8], embedding_dropout=0.5)
    plain = ClickModel(table, len(encoder.fields), 4, dense, [8])
    plain.mlp = model.mlp
    seen = []
    model.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    torch.manual_seed(0)
    for mode in (True, False):
        model.train(mode)
        model(batch)
    trained, evaluated = seen
    kept = trained != 0
    assert 0.4 < kept[:, :-dense].double().mean() < 0.6
    torch.testing.assert_close(trained[:, :-dense], 2 * evaluated[:, :-dense] * kept[:, :-dense])
    assert torch.equal(trained[:, -dense:], batch.dense)
    assert torch.equal(predict(model, data), predict(plain, data))


def test_methods_start_from_the_same_weights(encoded):
    encoder, _ = encoded
    weights = [
        methods.table_parameters(methods.build_table(m, encoder, 4, seed=5))[0].detach()
        for m in OWN
    ]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_accounting_of_a_fixed_table(encoded):
    encoder, _ = encoded
    table = methods.build_table("fixed", encoder, 4)
    assert methods.stored_bytes(table) == methods.dense_bytes(table) == encoder.num_rows * 16
    assert methods.row_widths(table).tolist() == [4] * encoder.num_rows
    assert methods.is_frozen(table)
    assert methods.mask_parameters(table) == []


@pytest.mark.parametrize("method", ["rule", "amtl"])
def test_widths_add_up_to_the_stored_bytes_once_frozen(encoded, method):
    encoder, _ = encoded
    table = methods.build_table(method, encoder, 8, budget=0.5)
    assert not methods.is_frozen(table)
    table.freeze()
    table.absorb_order()
    assert int(methods.row_widths(table).sum()) * 4 == methods.stored_bytes(table)
    assert methods.stored_bytes(table) <= 0.5 * methods.dense_bytes(table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "choose one of amtl, rule, fixed"),
        ({"dim": 0}, "--dim"),
        ({"options": {"min_dim": 4}}, "--method amtl"),
        ({"options": {"no_such": 1}}, "no_such"),
    ],
)
def test_unusable_settings_are_user_errors(encoded, arguments, message):
    encoder, _ = encoded
    with pytest.raises(UserError, match=message):
        methods.build_table(**{"method": "amtl", "encoder": encoder, "dim": 4, **arguments})


@pytest.mark.parametrize(
    ("changes", "optimizer", "rate"),
    [
        ({}, "adagrad", 1.0),
        ({"method": "fixed"}, "adagrad", 1.0),
        ({"table_lr": 0.3}, "adagrad", 0.3),
        ({"table_optimizer": "adam"}, "adam", 0.06),
        ({"table_optimizer": "adam", "table_lr": 0.1}, "adam", 0.1),
        ({"bits": "8", "masters": False}, "rowwise_adagrad", 1.0),
        # Adagrad's first steps would dwarf those of quantisers.
        ({"method": "mpe"}, "adam", 0.06),
    ],
)
def test_each_kind_of_table_has_its_optimizer(changes, optimizer, rate):
    config = TrainConfig("data", "label", **changes)
    assert (config.table_optimizer, config.table_lr) == (optimizer, rate)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_unknown_table_optimizer():
    with pytest.raises(UserError, match="adagrad"):
        methods.table_optimizer("lion", [], 0.1)
