"""What a statement says in words: who is trusted, what is drawn, and where the weak points are.

The words follow placement and settings, so that no statement promises what its events do not.
"""

from typing import NamedTuple

from fedjax_dp.privacy.settings import UNITWISE, MechanismSettings

_OWN_COMPUTERS = "Each site trusts its own computers and code."
_CURIOUS = "The server is honest but curious: it runs the protocol and may analyse all it receives."
_SIMULATED = "All sites and the server are simulated in one process, which holds all secrets."


class Disclosure(NamedTuple):
    """The texts of one statement.

    Attributes:
        noise: what is clipped, where noise enters, and on what.
        sampler: what is drawn by which coins, and what that amplifies.
        trust: who trusts whom.
        weak_points: what a reader must know before relying on the numbers.
    """

    noise: str
    sampler: str
    trust: str
    weak_points: tuple[str, ...]


def disclosure(m: MechanismSettings) -> Disclosure:
    """The texts for clients with settings like `m`.

    Args:
        m: settings of any client; only what all clients of a run have in common is looked at.
    """
    return Disclosure(_noise(m), _sampler(m), _trust(m), tuple(_weak_points(m)))


def _noise(m: MechanismSettings) -> str:
    texts = {
        "none": "nothing is clipped, and no noise is added",
        "dp_sgd": f"each site clips the gradient of every {m.unit} and noises their sum, in every "
        "local step, before anything leaves the site",
        "update": "each site clips its model update of the round and noises it, before it leaves "
        "the site",
        "distributed": f"each site clips the gradient of every {m.unit} and adds its share of the "
        "noise to their sum; the server opens only the sum of all sites, which holds all of the "
        "noise",
        "central": "each site clips its model update of the round; the server, which sees them "
        "as they are, adds noise to their sum",
        "update_unclipped": "each site noises its model update, but nothing bounds how far one "
        "person moves it",
    }
    text = texts[m.placement]
    if m.noise == "discrete_gaussian":
        text += "; numbers are integers throughout, and so is the noise"
    if m.count_noise_stddev is not None:
        text += (
            "; the clip norm follows a noised count of what it did not clip, and this count is "
            "part of every event below"
        )
    return text


def _sampler(m: MechanismSettings) -> str:
    if m.relation == "add_or_remove":
        size = "never cut"
    else:
        size = "cut uniformly at random above the capacity"
    units = f"{m.unit}s are drawn by Poisson sampling, afresh in each local step, {size}"
    if m.placement in ("none", "update_unclipped"):
        return f"{units}; nothing is accounted, as there is no guarantee"
    if m.placement == "update":
        return (
            f"{units}; that amplifies the rows named record, and nothing else; sampling of clients "
            "amplifies nothing, as the server sees who takes part"
        )
    if m.placement == "central":
        clients = "every client takes part in every round"
        if m.cohort_prob < 1:
            clients = (
                f"every client takes part in a round with probability p = {m.cohort_prob:g}, by "
                "independent coins, and who took part stays secret; that amplifies"
            )
        return f"{clients}; {units}, which amplifies the rows named record"
    if m.noise == "discrete_gaussian" or m.relation == "add_or_remove":
        accounted = "accounted as that draw, without a cut"
    else:
        accounted = "accounted as that truncated draw"
    clients = (
        "every client takes part in every round"
        if m.placement == "distributed"
        else "sampling of clients amplifies nothing, as the server sees who takes part"
    )
    return f"{units}; {accounted}; {clients}"


def _trust(m: MechanismSettings) -> str:
    if m.placement == "central":
        secret = " It keeps secret who took part in a round." if m.cohort_prob < 1 else ""
        return (
            f"{_OWN_COMPUTERS} All sites trust the server: it sees every site's update without "
            f"noise, and adds the noise itself.{secret} Against the server there is no guarantee. "
            "Sites need not trust each other."
        )
    if m.placement == "distributed":
        lost = (
            "A round in which a site drops out opens nothing."
            if m.max_dropouts == 0
            else f"A round opens only if at most {m.max_dropouts} of {m.num_shares} sites drop out."
        )
        return (
            f"{_OWN_COMPUTERS} {_CURIOUS} It sees only the sum of all sites, as the messages are "
            f"masked by secure aggregation, which is simulated here. {lost} Every site is trusted "
            "to add its share of the noise; for all other sites that work together with the "
            "server against one, and for a server that sees single shares, the epsilon is another "
            "and larger one, stated as a row of its own."
        )
    if m.placement in ("none", "update_unclipped"):
        return (
            f"{_OWN_COMPUTERS} Everyone who receives anything has to be trusted with the training "
            "data, for there is no guarantee against anybody."
        )
    return (
        f"{_OWN_COMPUTERS} {_CURIOUS} Sites need not trust each other: a site's guarantee depends "
        "on its own noise alone."
    )


def _weak_points(m: MechanismSettings) -> list[str]:
    points = []
    if m.placement != "none":
        points += _randomness(m)
    points += ["Validation, test and external patients have no guarantee.", _public(m)]
    if m.placement == "central":
        points.append("The server and its operators see every site's update without noise.")
        if m.cohort_prob < 1:
            points.append(
                "Who took part in a round must stay secret, also from a look at the network: with "
                "that known, nothing is amplified and epsilon is larger."
            )
    if m.placement == "distributed":
        points.append(
            "Secure aggregation is simulated, without key agreement, signatures or separate "
            "machines; against a server that breaks the protocol only the rows on single shares "
            "hold. Masks are as secret as SHAKE-256 is pseudo-random."
        )
    if m.placement in UNITWISE and m.unit == "tile" and m.max_units_per_patient is None:
        points.append("A patient has many tiles, and nothing bounds how many: see patient_epsilon.")
    if m.count_noise_stddev is not None:
        points.append(
            "The clip norm of a round shows the noised count; sum and count share one budget."
        )
    return [*points, _SIMULATED]


def _randomness(m: MechanismSettings) -> list[str]:
    if m.noise == "discrete_gaussian":
        return [
            "The generator of augmentations (threefry) has keys of 64 bits; that of the draws and "
            "of the noise (Philox) has 128 bits and is not made for cryptography.",
            "Integer noise is exact: its law, the integer sensitivity and the opened sum (modulo "
            "2^32) are those of the proof. Its epsilon is an upper bound: concentrated DP of the "
            "sum of discrete Gaussians (Kairouz et al. 2021), amplified by Renyi DP. Gradients are "
            "computed and clipped in floating point before they are rounded.",
        ]
    points = [
        "The generator of noise and augmentations (threefry) has keys of 64 bits; that of the "
        "draws (Philox) has 128 bits and is not made for cryptography.",
        "Noise in floating-point numbers, whose rounding can leak, is hardened, not proven.",
    ]
    if m.placement == "distributed":
        points.append(
            "Each noised message is rounded to fixed-point words, by far less than its noise: that "
            "rounding is outside of the proof."
        )
    return points


def _public(m: MechanismSettings) -> str:
    if m.relation == "add_or_remove":
        return (
            f"Numbers of {m.unit}s are private. What num_units says, and 1/n with it, is a nominal "
            "number declared without the data; that, sampling probabilities and weights are "
            "public."
        )
    return "Numbers of units, sampling probabilities, capacities and weights are public."
