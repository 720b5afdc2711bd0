"""A folder of tiles cut from slides: one zarr3 array of images and one of labels for each slide."""
