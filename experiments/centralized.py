"""All sites' tiles in one pool: the upper bound that a federation is compared with.

    python -m experiments.centralized --workdir=runs/centralized --config.privacy.placement=none

The flags are those of `experiments.feddp`.
"""

from experiments import launcher

if __name__ == "__main__":
    launcher.main("centralized", **{"federation.pooled": True, "privacy.placement": "none"})
