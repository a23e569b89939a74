"""Public sequential benchmarks: any (user, item, order) file, leave-one-out, exact ranking over the whole catalogue."""
