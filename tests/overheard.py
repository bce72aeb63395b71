"""What processes ask the network for: every host name and every address, whichever library or language asks.

The C library's own calls are interposed, so Python, native code and all that a process starts are heard. What is not this
machine is refused at once: nothing leaves while a test listens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_SHIM = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *which) {
    const char *path = getenv("OVERHEARD");
    if (!path) return;
    char name[64] = "", line[1024];
    int self = open("/proc/self/comm", O_RDONLY | O_CLOEXEC);
    if (self >= 0) {
        ssize_t got = read(self, name, sizeof name - 1);
        if (got > 0) name[got - 1] = 0;
        close(self);
    }
    int length = snprintf(line, sizeof line, "%s %s (%s %d)\n", what, which, name, (int)getpid());
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (file >= 0) { if (write(file, line, (size_t)length) < 0) {} close(file); }
}

static int own_name(const char *name) {
    unsigned char address[16];
    char mine[256] = "";
    gethostname(mine, sizeof mine - 1);
    return !name || !*name || !strcmp(name, "localhost") || !strcmp(name, mine)
        || inet_pton(AF_INET, name, address) == 1 || inet_pton(AF_INET6, name, address) == 1;
}

/* 0 for this machine's own addresses, and for what is no internet address. */
static int foreign(const struct sockaddr *to, const char *what) {
    char text[INET6_ADDRSTRLEN + 16] = "";
    int port;
    if (!to) return 0;
    if (to->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)to;
        unsigned first = ntohl(in->sin_addr.s_addr) >> 24;
        port = ntohs(in->sin_port);
        if ((first == 127 || first == 0) && port != 53) return 0;
        inet_ntop(AF_INET, &in->sin_addr, text, sizeof text);
    } else if (to->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in = (const void *)to;
        const unsigned char *a = in->sin6_addr.s6_addr;
        port = ntohs(in->sin6_port);
        int mapped = IN6_IS_ADDR_V4MAPPED(&in->sin6_addr) && (a[12] == 127 || a[12] == 0);
        if ((IN6_IS_ADDR_LOOPBACK(&in->sin6_addr) || IN6_IS_ADDR_UNSPECIFIED(&in->sin6_addr) || mapped) && port != 53) return 0;
        inet_ntop(AF_INET6, &in->sin6_addr, text, sizeof text);
    } else return 0;
    snprintf(text + strlen(text), 8, ":%d", port);
    note(what, text);
    return 1;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    REAL(int, "getaddrinfo", const char *, const char *, const struct addrinfo *, struct addrinfo **);
    if (own_name(node)) return real(node, service, hints, found);
    note("name", node);
    return EAI_NONAME;
}
struct hostent *gethostbyname(const char *node) {
    REAL(struct hostent *, "gethostbyname", const char *);
    if (own_name(node)) return real(node);
    note("name", node);
    h_errno = HOST_NOT_FOUND;
    return NULL;
}
int gethostbyname_r(const char *node, struct hostent *ret, char *buf, size_t len, struct hostent **result, int *error) {
    REAL(int, "gethostbyname_r", const char *, struct hostent *, char *, size_t, struct hostent **, int *);
    if (own_name(node)) return real(node, ret, buf, len, result, error);
    note("name", node);
    *result = NULL;
    *error = HOST_NOT_FOUND;
    return 0;
}
int connect(int fd, const struct sockaddr *to, socklen_t len) {
    REAL(int, "connect", int, const struct sockaddr *, socklen_t);
    if (foreign(to, "address")) { errno = ENETUNREACH; return -1; }
    return real(fd, to, len);
}
ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t len) {
    REAL(ssize_t, "sendto", int, const void *, size_t, int, const struct sockaddr *, socklen_t);
    if (foreign(to, "datagram")) { errno = ENETUNREACH; return -1; }
    return real(fd, data, size, flags, to, len);
}
ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    REAL(ssize_t, "sendmsg", int, const struct msghdr *, int);
    if (message && foreign(message->msg_name, "datagram")) { errno = ENETUNREACH; return -1; }
    return real(fd, message, flags);
}
"""


class Listener:
    """Hears processes that are started with its environment, and theirs."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler, "a C compiler is needed to hear what native code asks the network for; install gcc"
        source, self._shim, self._heard = folder / "shim.c", folder / "shim.so", folder / "heard.txt"
        source.write_text(_SHIM)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", self._shim, source, "-ldl"], check=True)

    def environment(self, values: Mapping[str, str] | None = None) -> dict[str, str]:
        """A person's environment, in which none of our settings is there yet."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
        return {**kept, "LD_PRELOAD": str(self._shim), "OVERHEARD": str(self._heard), **(values or {})}

    def heard(self) -> list[str]:
        """All that was asked for since the last call, one line each: `name HOST (PROGRAM PID)`."""
        found = self._heard.read_text().splitlines() if self._heard.exists() else []
        self._heard.unlink(missing_ok=True)
        return found
