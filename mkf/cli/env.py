"""`mkf env`: what this installation can run, where, and why the rest cannot."""

from mkf.cli._console import print_table, stdout
from mkf.cli._errors import user_errors


def command() -> None:
    """Print versions, devices and every implementation of every operator: chosen, available, or why it cannot run."""
    import platform

    import torch
    from rich.table import Table
    from rich.text import Text

    import mkf
    from mkf.kernels import extension, registry

    console = stdout()
    missing = extension.missing()
    with user_errors():
        native = f"instruction set {extension.isa()}" if missing is None else missing
    console.print(f"mkf {mkf.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    console.print(f"CPU: {torch.get_num_threads()} threads; extension: {native}", soft_wrap=True)
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices[1:]:
        console.print(f"{device}: {torch.cuda.get_device_name(device)}")
    if len(devices) == 1:
        devices.append(torch.device("cuda"))  # to say why nothing runs there
    for operator in registry.operators():
        table = Table("implementation", "what it is", *map(str, devices), title=operator, title_justify="left")
        with user_errors():
            chosen = {
                device: registry.choose(operator, device)
                for device in devices
                if device.type == "cpu" or device.index is not None
            }
        for implementation in registry.implementations(operator):
            cells = []
            for device in devices:
                reason = implementation.why_not(device)
                word = "chosen" if implementation is chosen.get(device) else "available"
                cells.append(Text(word, "green") if reason is None else Text(reason, "dim"))
            table.add_row(implementation.name, implementation.description, *cells)
        print_table(console, table)
