"""The `dspark` command. One file per verb, each with `add_arguments(parser)`, what it takes, and `run(options)`, its exit code."""
