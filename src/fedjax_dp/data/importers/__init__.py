"""Published data sets as their authors lay them out, made into images, masks and a manifest."""
