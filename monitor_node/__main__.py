"""`python -m monitor_node` is `monitor-node`."""

from monitor_node.cli import main

if __name__ == "__main__":
    main()
