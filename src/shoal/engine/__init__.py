"""Many sequences through one step after another: ids in, ids out."""
