"""A federation of sites trains a segmentation U-Net, with or without differential privacy.

    python -m experiments.feddp --workdir=runs/feddp --config.privacy.target_epsilon=8

Without a manifest the tiles are the synthetic federation's. `python -m experiments.feddp --help`
lists the flags; `fedjax_dp.config` explains them.
"""

from experiments import launcher

if __name__ == "__main__":
    launcher.main("feddp")
