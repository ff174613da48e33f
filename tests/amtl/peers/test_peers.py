"""Methods of the field: each against a case computed by hand, and its bytes against its budget."""

from __future__ import annotations

import math

import pytest
import torch
from amtl.layer.embedding import AMTLEmbedding
from amtl.peers import PEERS, DoesNotFit, Facts, Part, SearchingPeer, served_bytes
from amtl.peers.base import choices_in_budget
from amtl.peers.fields import AutoDim, OptEmbed, evolved
from amtl.peers.hashing import DoubleHash, QuotientRemainder
from amtl.peers.popularity import AutoEmb, Esapn, Nis, standardised
from amtl.peers.pruning import MagnitudePruning, Pep, sparse_parts
from amtl.peers.quantised import Alpt, Mpe, PostTraining, best_rounding, rounded
from amtl.peers.sized import MixedDimension, Shuffled, mixed_widths
from torch import nn


def facts(budget, counts=(9, 7, 5, 3, 2, 1, 8, 1), sizes=(6, 2), dim=2, **more) -> Facts:
    fields = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Facts(torch.tensor(counts), fields, list(sizes), dim, budget, **more)


def long_facts(budget, rows=400, dim=8, **more) -> Facts:
    counts = (1000 / torch.arange(1, rows + 1)).long()
    sizes = [rows - 50, 50]
    return facts(budget, counts.tolist(), sizes, dim, **more)


def settled(kind, given: Facts, change=None, **options):
    """A peer as it is served, its search trained by `change` alone."""
    table = kind(given, **options)
    if not isinstance(table, SearchingPeer):
        return table
    with torch.no_grad():
        if change is not None:
            change(table)
    made = kind(given, **options)
    made.settle(table)
    return made


def test_parts_are_counted_in_whole_bytes():
    assert served_bytes([Part(3, 2), Part(2, 32), Part(9, 1)]) == 1 + 8 + 2
    # Two full rows, one of two numbers with a bit a column, one of one number of 4.
    parts = sparse_parts(torch.tensor([4, 4, 2, 1, 0]), 4)
    assert [(p.count, p.bits) for p in parts] == [(11, 32), (4 + 2, 1), (4, 64)]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("share", [1.0, 0.4, 0.15])
def test_budgets_are_met_and_mostly_used(name, share):
    full = 4 * 400 * 8
    given = long_facts(int(share * full))
    table = settled(PEERS[name], given)
    assert table.value_bytes() <= given.budget
    # Codes of few bits, and sizes that are the whole table's, end before the budget does.
    least = {"ptq": 0.12, "alpt": 0.5, "mpe": 0.15, "autodim": 0.5}.get(name, 0.75)
    assert table.value_bytes() >= least * given.budget or share == 1.0
    bits = table.row_bits()
    assert bits is None or int(bits.sum()) <= 8 * given.budget
    out = table(torch.arange(400))
    assert out.shape == (400, 8) and out.isfinite().all()


@pytest.mark.parametrize("name", PEERS)
def test_a_budget_below_the_least_is_refused(name):
    with pytest.raises(DoesNotFit):
        settled(PEERS[name], long_facts(3))


@pytest.mark.parametrize("name", PEERS)
def test_every_parameter_learns_and_bags_are_means(name):
    table = settled(PEERS[name], long_facts(6000, init_std=0.5))
    rows = torch.tensor([3, 1, 4, 1, 390])
    out = table(rows, torch.tensor([0, 2, 2]))
    each = table(rows)
    torch.testing.assert_close(out, torch.stack([each[:2].mean(0), 0 * each[0], each[2:].mean(0)]))
    loss = (table(torch.arange(400)) * torch.arange(3200.0).view(400, 8).sin()).sum()
    loss.backward()
    trained = [*table.table_parameters(), *table.mask_parameters()]
    assert trained
    for parameter in trained:
        grad = parameter.grad
        # Maps of widths that were not chosen have none.
        assert name == "autodim" or float(grad.to_dense().abs().sum()) > 0
    assert all(p.grad.is_sparse for p in table.table_parameters())


@pytest.mark.parametrize("name", ["qr", "double_hash", "mde", "alpt"])
def test_all_that_is_trained_is_counted(name):
    table = settled(PEERS[name], long_facts(6000))
    bits = table.bits if name == "alpt" else 32
    numbers = sum(p.numel() for p in table.table_parameters())
    others = sum(p.numel() for p in table.mask_parameters())
    assert table.value_bytes() >= numbers * bits // 8 + 4 * others
    assert others > 0 or name in ("qr", "double_hash")


def test_quotient_and_remainder():
    # Field of 6: three remainders and two quotients; of 2: a row each. 7 rows of 2 numbers.
    table = QuotientRemainder(facts(7 * 8 + 8), "mult")
    assert table.value_bytes() == 64 and table.width == 2
    remainder, quotient = table.remainder, table.quotient
    out = table(torch.tensor([4, 2, 7]))
    torch.testing.assert_close(out[0], remainder[1] * quotient[1])
    torch.testing.assert_close(out[1], remainder[2] * quotient[0])
    torch.testing.assert_close(out[2], remainder[4])
    added = QuotientRemainder(facts(64), "add")
    torch.testing.assert_close(added(torch.tensor(5)), added.remainder[2] + added.quotient[1])
    # All 8 rows fit, or half as wide ones.
    assert len(QuotientRemainder(facts(8 * 8 + 8)).remainder) == 8
    assert QuotientRemainder(facts(8 * 4 + 8)).width == 1


def test_no_two_values_share_both_rows():
    table = QuotientRemainder(long_facts(3000))
    pairs = torch.stack([table.first, table.second], 1)
    assert len(pairs.unique(dim=0)) == 400


def test_double_hashing_keeps_frequent_rows():
    table = DoubleHash(facts(5 * 8 + 8), frequent=0.5, width=2)
    assert len(table.weight) == 5 and table.value_bytes() == 48
    # The two most frequent of all have rows 0 and 1.
    torch.testing.assert_close(table(torch.tensor([0, 6])), table.weight[:2])
    first, second = table.places[4].tolist()
    assert min(first, second) >= 2
    torch.testing.assert_close(table(torch.tensor(4)), table.weight[first] + table.weight[second])
    whole = DoubleHash(facts(1000))
    torch.testing.assert_close(whole(torch.arange(8)), whole.weight[whole.places[:, 0]])


def test_mixed_dimensions():
    popularity, rows = torch.tensor([16.0, 1.0]).double(), torch.tensor([2, 10])
    # Widths as 4 to 1. [8, 2]: 36 numbers and 16 to project; [3, 1]: 16 and 32; blocks take 16.
    assert mixed_widths(popularity, rows, 0.5, 8, 4 * 52 + 16) == [8, 2]
    assert mixed_widths(popularity, rows, 0.5, 8, 4 * 52 + 15) == [3, 1]
    assert mixed_widths(popularity, rows, 0.0, 8, 10_000) == [8, 8]
    table = MixedDimension(long_facts(6000), 0.5, "popularity")
    assert len(set(table.widths)) > 1 and len(table.widths) > 2
    row = 399
    block, place = int(table.block[row]), int(table.place[row])
    projected = [b for b, d in enumerate(table.widths) if d < 8]
    assert block in projected
    expected = table.tables[block][place] @ table.projections[projected.index(block)]
    torch.testing.assert_close(table(torch.tensor(row)), expected)
    lookups = torch.bincount(table.block, weights=table.facts.counts.double())
    # Quarters of the large field's lookups, but for the one row that is more than a quarter.
    assert float(lookups[:4].max() / lookups[:4].sum()) < 0.4


def test_shuffled_sizes_are_the_rule_s_in_another_order():
    given = long_facts(4000)
    table = Shuffled(given)
    rule = AMTLEmbedding(
        400,
        8,
        counts=given.counts,
        field_sizes=given.field_sizes,
        budget=(4000 - 72) / (4 * 3200),
        bits=None,
        tier_width=1,
    ).row_dims()
    assert torch.equal(table.widths.sort().values, rule.sort().values.long())
    assert not torch.equal(table.widths, rule.long())
    row = int(((table.widths > 0) & (table.widths < 8)).nonzero()[0])
    kept = int(table.widths[row])
    expected = torch.cat([table.weight[row, :kept], torch.zeros(8 - kept)])
    torch.testing.assert_close(table(torch.tensor(row)), expected)


def test_pruning_keeps_the_largest_numbers():
    values = torch.tensor([[5.0, -1.0, 0.5, 3.0], [0.1, 0.2, -4.0, 0.3], [0.0, 0.0, 0.0, 2.0]])

    def train(table):
        table.weight.copy_(values)

    given = facts(0, (9, 4, 1), (3,), 4)
    # 5 and 3 of one row, 4 of another: numbers 12, columns 4 + 2 bits, ends of rows 4 times 8.
    exact = Facts(given.counts, given.fields, given.field_sizes, 4, 12 + 1 + 32)
    table = settled(MagnitudePruning, exact, train)
    assert table.value_bytes() == 45
    expected = torch.tensor([[5.0, 0, 0, 3.0], [0, 0, -4.0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(table(torch.arange(3)), expected)
    less = Facts(given.counts, given.fields, given.field_sizes, 4, 44)
    assert int(settled(MagnitudePruning, less, train).mask.sum()) == 2
    # The fourth is 2, but times the root of count + 1 the first row's -1 is 3.2 and that 2 is 2.8.
    more = Facts(given.counts, given.fields, given.field_sizes, 4, 49)
    assert bool(settled(MagnitudePruning, more, train).mask[2, 3])
    by_row = settled(MagnitudePruning, more, train, by="row").mask
    assert by_row.sum(1).tolist() == [3, 1, 0] and bool(by_row[0, 1])


def test_learned_thresholds():
    given = facts(12 + 1 + 32, (9, 4, 1), (3,), 4, init_std=1.0)
    table = Pep(given, each="row", pull=2.0)
    initial = table.weight.detach().clone()
    with torch.no_grad():
        table.weight.copy_(
            torch.tensor([[2.0, -1.0, 0.5, 3.0], [0.1, 0.2, -4, 0.3], [0, 0, 0, 2.2]])
        )
        table.threshold.copy_(torch.tensor([[0.0], [math.log(3.0) / 2], [-50.0]]))
    # sigmoid(2 * 0) = 1/2, sigmoid(log 3) = 3/4.
    shown = table(torch.arange(3))
    expected = torch.tensor([[1.5, -0.5, 0.0, 2.5], [0, 0, -3.25, 0], [0, 0, 0, 2.2]])
    torch.testing.assert_close(shown, expected)
    assert not table.searched() and len(table.mask_parameters()) == 1
    squares = (4 + 1 + 0.25 + 9) + (0.01 + 0.04 + 16 + 0.09) + 4.84
    decay = 0.5 * 1e-5 * (squares + math.log(3.0) ** 2 + 100.0**2)
    assert float(table.penalty().detach()) == pytest.approx(decay, rel=1e-5)
    with torch.no_grad():
        table.threshold[2] = 50.0
    # 1.5, 0.5, 2.5, 3.25 and 1.2 are left, 53 bytes.
    assert not table.searched()
    made = Pep(given, each="row", pull=2.0)
    made.settle(table)
    # What is most above its threshold survives, with the values it once started from.
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(made(torch.arange(3)), initial * mask)
    assert not made.mask_parameters() and made.phase == "frozen"


def test_rounding_is_lsq():
    values = torch.tensor([-2.0, -0.3, 0.2, 0.26, 5.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    offset = torch.tensor(0.0, requires_grad=True)
    out = rounded(values, step, 2, offset)
    torch.testing.assert_close(out.detach(), torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.5]))
    out.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    # LSQ: the bound outside, round(v / s) - v / s inside.
    inside = (-1 + 0.6) + (0 - 0.4) + (1 - 0.52)
    assert float(step.grad) == pytest.approx(-2 + 1 + inside, abs=1e-5)
    assert float(offset.grad) == 2.0


def test_choices_in_a_budget():
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.1, 0.9], [0.0, 0.0, 0.0]])
    costs = torch.tensor([[0, 10, 20]] * 3)
    # What was found, with the tie's least; then what is lost least per unit.
    assert choices_in_budget(scores, costs, 30).tolist() == [1, 2, 0]
    assert choices_in_budget(scores, costs, 60).tolist() == [2, 2, 2]
    assert choices_in_budget(scores, costs, 10).tolist() == [1, 0, 0]
    assert choices_in_budget(scores, costs, 9).tolist() == [0, 0, 0]
    # One group is small, and the dearer option may come first.
    assert choices_in_budget(scores[:2], torch.tensor([[4, 1, 2], [10, 20, 30]]), 12).tolist() == [
        1,
        0,
    ]
    with pytest.raises(DoesNotFit):
        choices_in_budget(scores, costs + 5, 14)


def test_widths_of_fields():
    given = long_facts(6000, init_std=0.5)
    table = AutoDim(given, noise=0.0)
    assert table.widths == [1, 2, 4, 8] and table.architecture() == [table.alpha]
    rows = torch.tensor([3, 360, 5])
    first = table.weight[torch.tensor([3, 5])]
    mapped = [first[:, :d] @ m[0] for d, m in zip(table.widths, table.maps, strict=True)]
    # Two values normalised are plus and minus one, nearly.
    normed = [(m - m.mean(0)) / (m.var(0, unbiased=False) + 1e-5).sqrt() for m in mapped]
    torch.testing.assert_close(table(rows)[[0, 2]], sum(normed) / 4)
    # Rows of 350 and 50 values: 4 * (rows * width + width * 8 for the map).
    assert table.costs().tolist() == [[1432, 2864, 5728, 11200], [232, 464, 928, 1600]]
    with torch.no_grad():
        table.alpha[0, 1], table.alpha[1, 3] = 5.0, 1.0
    made = AutoDim(given)
    made.settle(table)
    assert made.choice.tolist() == [1, 3] and made.value_bytes() == 2864 + 1600 + 8
    shown = made(rows)
    torch.testing.assert_close(shown[0], made.weight[3, :2] @ made.maps[1][0])
    torch.testing.assert_close(shown[1], made.weight[360])


def normed(mapped):
    return (mapped - mapped.mean(0)) / (mapped.var(0, unbiased=False) + 1e-5).sqrt()


def test_widths_by_popularity():
    # Counts 4, 1, 1 of one field and 1, 4 of another: four groups, numbers for widths 1 and 2.
    given = facts(0, (4, 1, 1, 1, 4), (3, 2), 2, init_std=1.0)
    table = AutoEmb(given, hidden=4)
    assert table.widths == [1, 2] and table.weight.shape == (5, 3)
    assert table.group.tolist() == [1, 0, 0, 2, 3]
    rows = torch.tensor([0, 1, 4])
    values, maps = table.weight[rows].detach(), table.maps.detach()
    one, two = values[:, :1] @ maps[:1], values[:, 1:] @ maps[1:]
    # Equal weights at first.
    shown = table(rows)
    torch.testing.assert_close(shown, (normed(one).tanh() + normed(two).tanh()) / 2)
    with torch.no_grad():
        for controller, weight in zip(table.controllers, (3.0, -3.0), strict=True):
            controller[0].weight.fill_(1.0)
            controller[0].bias.zero_()
            controller[2].weight[0] = weight / 4
    # log 5 and log 2 are one deviation apart from their mean in the second field; in the first
    # there are two groups as well.
    logits = 3 * math.tanh(1.0)
    weight = 1 / (1 + math.exp(-logits))
    expected = torch.tensor([1 - weight, weight, weight, 1 - weight])
    torch.testing.assert_close(table.log_weights().exp()[:, 0], expected)
    table.eval()
    with torch.no_grad():
        table.mean[1], table.variance[1], table.scale[1], table.shift[1] = 0.5, 4.0, 2.0, -1.0
    both = [
        ((one - table.mean[0]) / (table.variance[0] + 1e-5).sqrt()).tanh(),
        (2 * (two - 0.5) / 2 - 1).tanh(),
    ]
    w = expected[table.group[rows]][:, None]
    torch.testing.assert_close(table(rows), w * both[0] + (1 - w) * both[1], rtol=1e-4, atol=1e-5)
    assert len(table.architecture()) == 8

    def made(numbers: int) -> AutoEmb:
        budget = Facts(given.counts, given.fields, given.field_sizes, 2, 4 * numbers, 1.0)
        other = AutoEmb(budget, hidden=4)
        other.settle(table)
        return other

    # The rare ones of the first field and the frequent one of the second are 2 wide: 8 numbers;
    # maps and shifts 2 * 2 and 3 * 2, ends 2 * 2.
    enough = made(8 + 10 + 4)
    assert enough.choice.tolist() == [1, 0, 0, 1] and enough.value_bytes() == 4 * 22
    assert enough.row_bits().tolist() == [32, 64, 64, 32, 64] and not enough.architecture()
    enough.eval()
    scale = (1 + 1e-5) ** -0.5
    weight = enough.weight.detach()
    torch.testing.assert_close(enough(torch.tensor(0)), (weight[0, :1] @ maps[:1] * scale).tanh())
    torch.testing.assert_close(enough(torch.tensor(4)), (weight[4, 1:] @ maps[1:] * scale).tanh())
    # One number less, and no room for the second map.
    assert int(made(21).choice.sum()) == 1 and made(21).value_bytes() <= 4 * 21
    assert made(18).choice.tolist() == [0] * 4 and made(18).value_bytes() == 4 * (5 + 4 + 4)
    with pytest.raises(DoesNotFit):
        made(12)


def test_blocks_that_a_controller_buys():
    # 16 values, ends of row blocks after 1, 2, 4, 8 and 16; one value, which is all of them.
    counts = [16 - i for i in range(16)]
    given = facts(4 * 30 + 32, [*counts, 3], (16, 1), 8, init_std=1.0)
    table = Nis(given, price=0.5, warm_up=1)
    assert table.costs[0, 0].tolist() == [0, 2, 4, 8, 16, 32]
    assert table.costs[1, 3].tolist() == [0, 2, 2, 2, 2, 2]
    rows, weight = torch.arange(17), table.weight.detach()
    torch.testing.assert_close(table(rows), weight)
    assert float(table.architecture_loss(torch.ones(3)).detach()) == 0.0

    with torch.no_grad():
        table.logits[0, :, 2], table.logits[1, :, 1] = 50.0, 50.0
        table.logits[0, 1, 2], table.logits[0, 1, 5] = 0.0, 50.0
    expected = torch.zeros(17, 8)
    expected[:2], expected[:16, 2:4], expected[16] = weight[:2], weight[:16, 2:4], weight[16]
    torch.testing.assert_close(table(rows), expected)
    # Three times 4 numbers, 32, and 4 times 2: 52 where 30 are paid for.
    reward = -0.25 - 0.5 * (52 / 30 - 1)
    assert float(table.architecture_loss(torch.tensor([0.2, 0.3])).detach()) == 0.0
    assert float(table.usual) == pytest.approx(reward)
    table(rows)
    table.architecture_loss(torch.tensor([0.15, 0.15])).backward()
    # It was better than usual by .1 nats: of a likely choice nothing changes, of an even one
    # what was drawn gains.
    assert float(table.usual) == pytest.approx(reward + 0.05 * 0.1)
    assert float(table.logits.grad.abs().max()) < 1e-6
    with torch.no_grad():
        table.logits.zero_()
    table.logits.grad = None
    table(rows)
    drawn, usual = table._drawn, float(table.usual)
    over = max(0.0, float(table.costs.gather(2, drawn[:, :, None]).sum()) / 30 - 1)
    table.architecture_loss(torch.tensor([0.4])).backward()
    onehot = nn.functional.one_hot(drawn, 6)
    gain = -0.4 - 0.5 * over - usual
    torch.testing.assert_close(table.logits.grad, -gain * (onehot - 1 / 6))


def test_bought_blocks_fit():
    counts = [16 - i for i in range(16)]
    given = facts(4 * 30 + 32, [*counts, 3], (16, 1), 8, init_std=1.0)
    table = Nis(given)
    with torch.no_grad():
        table.logits[0, 0, 4], table.logits[0, 1:, 1], table.logits[1, :, 1] = 9.0, 9.0, 9.0
    made = Nis(given)
    made.settle(table)
    # 16, three times 2 and four times 2.
    assert made.choice.tolist() == [[4, 1, 1, 1], [1, 1, 1, 1]]
    assert made.value_bytes() == given.budget
    expected = torch.zeros(17, 8)
    expected[0], expected[:8, :2], expected[16] = (
        made.weight[0],
        made.weight[:8, :2],
        made.weight[16],
    )
    torch.testing.assert_close(made(torch.arange(17)), expected)
    assert made.row_bits().tolist() == [256, *[64] * 7, *[0] * 8, 256]
    table.eval()
    torch.testing.assert_close(table(torch.arange(17)) != 0, made(torch.arange(17)) != 0)
    assert not made.mask_parameters() and not made.architecture()


def esapn(budget=10_000) -> Esapn:
    """Counts 8, 2, 1 and 1 of two fields; widths 1, 2 and 4; doubles what was seen often."""
    table = Esapn(facts(budget, (8, 2, 1, 1), (3, 1), 4, init_std=1.0), hidden=1)
    with torch.no_grad():
        for policy in table.policies:
            for parameter in policy.parameters():
                parameter.zero_()
            policy[0].weight[0, 0], policy[2].weight[1, 0] = 1.0, 2.0
            policy[2].bias[0] = 1.0
    return table


def test_rows_that_grow():
    table = esapn()
    # Doubles where 2 tanh(log(1 + seen) / log(1 + most)) is above 1: from 3 of 8 on.
    seen = torch.tensor([2, 3, 8])
    policy = table.log_policy(torch.zeros(3).long(), seen, torch.tensor([0, 1, 0]))
    gap = [2 * math.tanh(math.log(1 + n) / math.log(9)) - 1 for n in (2, 3, 8)]
    torch.testing.assert_close(policy[:, 1] - policy[:, 0], torch.tensor(gap))
    assert gap[0] < 0 < gap[1]

    start = table.weight.detach().clone()
    table(torch.tensor([0, 1, 0, 2, 0, 1]))
    assert table.seen.tolist() == [3, 2, 1, 0] and table.option.tolist() == [1, 0, 0, 0]
    # Nothing is counted beyond the counts, and once of once is most.
    table(torch.tensor([0, 0, 0, 3, 1]))
    assert table.seen.tolist() == [6, 2, 1, 1] and table.option[3] == 1
    grown = start[3, :1] @ table.images[0].detach()
    torch.testing.assert_close(
        table.weight[3].detach(), torch.cat([start[3, :1], grown, start[3, 3:]])
    )
    # Narrow rows go through the images of all widths after theirs.
    table.eval()
    table.mean.zero_()
    table.variance.fill_(1.0)
    first, second = table.images
    scale = (1 + 1e-5) ** -0.5
    torch.testing.assert_close(
        table(torch.tensor([1, 3])).detach(),
        torch.stack(
            [(start[1, :1] @ first @ second * scale).tanh(), (grown @ second * scale).tanh()]
        ).detach(),
    )


def test_a_policy_is_rewarded_by_the_losses_of_its_values():
    table = esapn()
    table.trying = True
    with torch.no_grad():
        table.usual[0] = 0.7
        table.option[1] = 2
    before = {name: value.clone() for name, value in table.state_dict().items()}
    table(torch.tensor([[0, 3], [1, 3]]))
    kept = {"usual", "mean", "variance"}
    assert all(torch.equal(v, before[k]) for k, v in table.state_dict().items() if k not in kept)
    taken = table._taken.detach()
    # Row 1 cannot grow.
    assert taken[2] == 0 and (taken[[0, 1, 3]] < 0).all()
    loss = table.architecture_loss(torch.tensor([0.5, 0.9]))
    assert float(loss.detach()) == pytest.approx(-0.2 * float(taken[0]), rel=1e-5)
    # .7 and a fifth of the way to .5; first losses are taken as they are.
    torch.testing.assert_close(
        table.usual, torch.tensor([0.66, 0.9, torch.nan, 0.7]), equal_nan=True
    )
    loss.backward()
    assert all(p.grad is not None for p in table.policies[0].parameters())


def test_lookups_know_their_sample():
    table = esapn()
    # Two fields a sample; the second bag of the first one is empty.
    table(torch.tensor([0, 1, 3, 2, 3]), torch.tensor([0, 3, 3, 4]))
    assert table._samples.tolist() == [0, 0, 0, 1, 1]
    table(torch.tensor([[0, 3], [1, 3]]))
    assert table._samples.tolist() == [0, 0, 1, 1]


def test_widths_that_a_policy_ends_at():
    table = esapn()
    keep, double = (table.log_policy(torch.zeros(1).long(), torch.tensor([8]), torch.tensor([0])))[
        0
    ]
    torch.testing.assert_close(
        table.log_widths()[2], torch.stack([keep, double + keep, 2 * double])
    )
    torch.testing.assert_close(table.log_widths().exp().sum(1), torch.ones(4))
    # Rows of 4, 1, 1 and 4 numbers; maps of width 1 take 2 * 4, scales and shifts of full rows too;
    # ends 2 * 3.
    made = esapn(4 * (10 + 8 + 8 + 6))
    made.settle(table)
    assert made.value_bytes() <= made.facts.budget and not made.architecture()
    assert int(made.choice[made.group[0]]) >= int(made.choice[made.group[2]])
    assert made.kept_numbers(2) == 8 and made.kept_numbers(1) == 12 and made.kept_numbers(0) == 8


def test_popularity_is_standardised_by_field():
    fields = torch.tensor([0, 0, 1, 1, 2])
    x = standardised(torch.tensor([0, 6, 3, 3, 9]), fields)
    torch.testing.assert_close(x, torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0]))


def test_rows_above_a_threshold():
    given = facts(0, (9, 4, 1, 5), (3, 1), 2)
    table = OptEmbed(given, alpha=0.1)
    values = torch.tensor([[0.5, -0.25], [0.2, 0.1], [1.5, 0.5], [-0.25, 0.25]])
    with torch.no_grad():
        table.weight.copy_(values)
        table.threshold.copy_(torch.tensor([0.5, 1.0]))
    assert float(table.penalty().detach()) == pytest.approx(0.1 * (math.exp(-0.5) + math.exp(-1.0)))
    table.eval()
    shown = table(torch.arange(4))
    # Norms .75, .3, 2 and .5: the second row and that of the other field are below.
    kept = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    torch.testing.assert_close(shown, values * kept)
    shown.sum().backward()
    # Over the threshold by .25, -.2, 1.5 and -.5: the step's gradient is 1, 1.2, 0 and .4.
    steep, sums = torch.tensor([[1.0], [1.2], [0.0], [0.4]]), values.sum(1, keepdim=True)
    expected = kept + steep * sums * values.sign()
    torch.testing.assert_close(table.weight.grad.to_dense(), expected)
    torch.testing.assert_close(table.threshold.grad, torch.tensor([-0.25 * 1 - 0.3 * 1.2, 0.0]))

    table.train()
    torch.manual_seed(0)
    many = table(torch.zeros(400, dtype=torch.int64)).detach()
    # Half of all lookups show one number, the others both.
    assert set(many[:, 1].tolist()) == {-0.25, 0.0} and set(many[:, 0].tolist()) == {0.5}
    assert 150 < int((many[:, 1] == 0).sum()) < 250


def test_widths_that_evolve_within_the_budget():
    # A row of the first field and one of the second, 3 and 2 numbers beside 2 times 8 bytes.
    given = facts(4 * 5 + 16, (9, 4, 1, 5), (3, 1), 4, init_std=1.0)
    table = OptEmbed(given)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[2.0] * 4, [0.1] * 4, [0.9] * 4, [1.0] * 4]))
        table.threshold.copy_(torch.tensor([1.0, 1.0]))
    assert table._order().tolist() == [0, 3, 2]
    # Wants the first field 3 wide and the second 2, and as many rows as there can be.
    wanted = torch.tensor([3, 2])
    table.conclude(lambda: float(table.kept.sum() - (table.widths - wanted).abs().sum()))
    assert table.widths.tolist() == [3, 2] and table.kept.tolist() == [True, False, False, True]
    made = OptEmbed(given)
    made.settle(table)
    assert made.value_bytes() == given.budget and made.row_bits().tolist() == [96, 0, 0, 64]
    expected = made.weight.detach().clone()
    expected[1:3], expected[0, 3:], expected[3, 2:] = 0, 0, 0
    torch.testing.assert_close(made(torch.arange(4)), expected)
    assert not made.mask_parameters()


def test_an_evolution():
    asked = []

    def score(widths):
        asked.append(widths)
        return -sum(abs(a - b) for a, b in zip(widths, (3, 16, 9, 1), strict=True))

    generator = torch.Generator().manual_seed(0)
    best = evolved(score, [(8, 8, 8, 8)], 16, 30, generator)
    assert len(set(asked)) == len(asked) and asked[0] == (8, 8, 8, 8)
    assert score(best) >= -3 and all(1 <= k <= 16 for widths in asked for k in widths)
    # Without generations it is the best of one and twenty.
    asked.clear()
    best = evolved(score, [(3, 16, 9, 1)], 16, 0, generator)
    assert best == (3, 16, 9, 1) and len(asked) == 21


def test_mixed_precision():
    given = long_facts(3200, init_std=0.2)
    table = Mpe(given, decay=1e-2, groups=8)
    rows = torch.tensor([0, 399])
    # Every number of bits is equally likely at first; 0 bits show nothing.
    steps = table.steps.abs() + 1e-10
    values = [rounded(table.weight[rows], steps[b - 1], b) for b in range(1, 7)]
    torch.testing.assert_close(table(rows), sum(values) / 7, rtol=1e-4, atol=1e-6)
    lookups = torch.bincount(table.group, weights=given.counts.double())
    assert lookups.argmax() == 0 and len(table.group.unique()) == 8
    share = lookups / lookups[lookups > 0].min()
    assert float(table.penalty().detach()) == pytest.approx(
        float((1e-2 * 3.0 / share).sum()), rel=1e-4
    )
    with torch.no_grad():
        table.gamma[:, 2], table.gamma[0, 6] = 1.0, 2.0
        table.steps.fill_(0.25)
    made = Mpe(given, decay=1e-2, groups=8)
    made.settle(table)
    assert int(made.bits[0]) == 6 and served_bytes(made.parts()) <= 3200
    row = int((made.group == 7).nonzero()[0])
    bits = int(made.bits[7])
    expected = rounded(made.weight[row], torch.tensor(0.25), bits)
    torch.testing.assert_close(made(torch.tensor(row)), expected)
    assert len(made.mask_parameters()) == 2


def test_integers_all_through_training():
    table = Alpt(facts(8 * 2 + 8, init_std=0.3), bits=8)
    with torch.no_grad():
        table.steps.fill_(0.5)
        table.weight.fill_(0.6)
    drawn = []
    for _ in range(300):
        with torch.no_grad():
            table.weight.fill_(0.6)
        table.after_step()
        drawn.append(table.weight.detach().clone())
    drawn = torch.stack(drawn)
    assert set(drawn.unique().tolist()) == {0.5, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.6, abs=0.02)
    table.weight.data.fill_(1.0)
    table(torch.tensor([0, 1, 7])).sum().backward()
    # Codes are 2 everywhere: two numbers a row, two rows of the first field.
    torch.testing.assert_close(table.steps.grad, torch.tensor([8.0, 4.0]))


def test_rounding_after_training():
    levels = torch.tensor([[-1.5, -0.5], [0.5, 1.5]])
    step, values = best_rounding(0.3 * levels, 2)
    assert step == pytest.approx(0.3, rel=1e-5)
    torch.testing.assert_close(values, 0.3 * levels)
    given = long_facts(2000, init_std=1.0)
    table = settled(PostTraining, given, bits=4)
    for g in range(len(table.steps)):
        codes = table.weight.detach()[table.group == g] / table.steps[g] + 7.5
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert float(codes.min()) >= -1e-3 and float(codes.max()) <= 15 + 1e-3
