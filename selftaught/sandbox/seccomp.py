"""A seccomp filter: system calls that programs may not use fail with EPERM.

The filter is a program for the kernel's classic BPF machine. It is written for x86_64 and aarch64.
"""

import ctypes
import errno
import struct
import sys

import selftaught.sandbox.linux as linux

_DENIED: dict[str, tuple[int | None, int | None]] = {
    # name: numbers on x86_64 and aarch64
    # network
    "socket": (41, 198), "socketpair": (53, 199), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "connect": (42, 203), "accept4": (288, 242),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "execve": (59, 221), "execveat": (322, 281),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "unshare": (272, 97),
    "setns": (308, 268),
    # kernel interfaces with a large attack surface
    "bpf": (321, 280), "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "modify_ldt": (154, None),
    "set_mempolicy": (238, 237), "mbind": (237, 235), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "syslog": (103, 116), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "vhangup": (153, 58), "personality": (135, 92),
    # memory that the limits do not count, and communication between programs
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmctl": (31, 195), "shmat": (30, 196), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
}  # fmt: skip
_DENIED_IN_PROCESS_MODE: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "setsid": (112, 157), "setpgid": (109, 154),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "tkill": (200, 130),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
}  # fmt: skip
_ON_PROCESS = (62, 129), (234, 131), (302, 261)  # kill, tgkill, prlimit64
_CLONE, _CLONE3 = (56, 220), (435, 435)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NAMESPACES = 0x7E020000
"""Flags of `clone` that make namespaces."""
_THREAD = 0x00010000
_X32 = 0x40000000

_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NR, _ARCH, _ARGUMENT = 0, 4, 16
"""Offsets in the kernel's `seccomp_data`: system call, architecture, first argument."""


def supported() -> bool:
    """Return whether there is a filter for this system."""
    return sys.platform == "linux" and linux.machine() in _ARCHITECTURES


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def instructions(machine: str, *, only_this_process: int | None) -> bytes:
    """Return the filter.

    Args:
        machine: `x86_64` or `aarch64`.
        only_this_process: None, or the number of the only process that may be sent signals. New
            processes are then denied too.
    """
    column, architecture = _ARCHITECTURES[machine]
    deny = _op(_RETURN, _ERRNO | errno.EPERM)
    program = [
        _op(_LOAD, _ARCH),
        _op(_EQUAL, architecture, 1, 0),
        deny,  # another ABI, such as 32-bit calls on x86_64
        _op(_LOAD, _NR),
    ]
    if machine == "x86_64":
        program += [_op(_AT_LEAST, _X32, 0, 1), deny]
    denied = [numbers[column] for numbers in _DENIED.values()]
    if only_this_process is not None:
        denied += [numbers[column] for numbers in _DENIED_IN_PROCESS_MODE.values()]
    for number in denied:
        if number is not None:
            program += [_op(_EQUAL, number, 0, 1), deny]
    # the C library uses clone, whose flags can be read, where clone3 is missing
    program += [_op(_EQUAL, _CLONE3[column], 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    allow = _op(_RETURN, _ALLOW)
    flags = [_op(_LOAD, _ARGUMENT), _op(_ANY_BIT, _NAMESPACES, 0, 1), deny]
    if only_this_process is not None:
        flags += [_op(_ANY_BIT, _THREAD, 1, 0), deny]
    flags.append(allow)
    program += [_op(_EQUAL, _CLONE[column], 0, len(flags)), *flags]
    if only_this_process is not None:
        for numbers in _ON_PROCESS:
            check = [_op(_LOAD, _ARGUMENT), _op(_EQUAL, only_this_process, 2, 0)]
            # prlimit64 means this process by 0, kill would mean its group
            check.append(_op(_EQUAL, 0 if numbers[0] == 302 else only_this_process, 1, 0))
            check += [deny, allow]
            program += [_op(_EQUAL, numbers[column], 0, len(check)), *check]
    program.append(allow)
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(*, only_this_process: int | None = None) -> None:
    """Install the filter in this process. It holds for all its future threads and children."""
    code = instructions(linux.machine(), only_this_process=only_this_process)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.prctl(linux.PR_SET_SECCOMP, 2, ctypes.addressof(program))
