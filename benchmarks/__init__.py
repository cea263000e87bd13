"""What vcpo costs and gains: ``python -m benchmarks.NAME [--quick] [--json FILE]``."""
