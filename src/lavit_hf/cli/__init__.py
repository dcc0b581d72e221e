"""Bodies of the commands of `lavit`; their options and help are in `lavit_cli`."""
