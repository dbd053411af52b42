/* The shim in the CNI folder, and under the name extbridge-exec the launcher in a VM's container.
 *
 * docs/protocol.md says what goes over the wire; cni/extbridge/node/wire.py is the agent's side.
 * One request, one answer: what they mean is the agent's, so nothing is parsed or allocated here. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SECOND /* Tests have shorter ones. */
#define SECOND 1000
#endif
enum { CONNECT_MS = 5 * SECOND, STDIO_MS = 5 * SECOND, RETRY_MS = 20,
       CNI_ANSWER_MS = 60 * SECOND, TAP_ANSWER_MS = 10 * SECOND };
enum { HEAD = 4, MAX_STDIN = 1 << 20, MAX_CNI = 2 << 20, MAX_TAP_REQUEST = 256 << 10,
       MAX_TAP_ANSWER = 512 << 10, MAX_FDS = 250, FIRST_FD = 100, MAX_ARGS = 1 << 16 };
enum { MISUSED = 125, CANNOT_EXEC = 126, NOT_FOUND = 127 };

#define VERSIONS "{\"cniVersion\":\"1.1.0\",\"supportedVersions\":" \
    "[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n"
#define ERROR(code, message, hint) "{\"cniVersion\":\"1.1.0\",\"code\":" #code \
    ",\"msg\":\"" message "\",\"details\":\"" hint "\"}\n"
#define TOO_LONG "the path in EXTBRIDGE_RUN is too long for a socket in it: name a shorter one"
#define NO_ANSWER "the extbridge agent on this node does not answer"

static const char *run = "/run/extbridge";
static struct sockaddr_un agent = {.sun_family = AF_UNIX};
static uint8_t request[HEAD + MAX_CNI], answer[MAX_CNI];
static size_t request_size, answer_size;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000) + time.tv_nsec / 1000000;
}

static int ready(int fd, short events, int64_t deadline) {
    struct pollfd polled = {.fd = fd, .events = events};
    int64_t left;
    while ((left = deadline - now()) > 0) {
        int n = poll(&polled, 1, (int)left);
        if (n >= 0 || errno != EINTR) return n > 0;
    }
    return 0;
}

static uint32_t get_u32(const uint8_t *at) {
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static int print(int to, const void *text, size_t size) {
    const char *at = text;
    int64_t deadline = now() + STDIO_MS;
    while (size > 0) {
        if (!ready(to, POLLOUT, deadline)) return 0;
        /* So much a pipe that polls writable takes without blocking (fs/pipe.c, pipe_poll). */
        ssize_t n = write(to, at, size < PIPE_BUF ? size : PIPE_BUF);
        if (n < 0 && errno != EINTR && errno != EAGAIN) return 0;
        if (n > 0) at += n, size -= (size_t)n;
    }
    return 1;
}

static int add(const void *data, size_t size, size_t limit) {
    if (size > HEAD + limit - request_size) return 0;
    memcpy(request + request_size, data, size);
    request_size += size;
    return 1;
}

/* The request up to its body; `limit` is what it may have until there. */
static int begin(const char *kind, const char *prefix, size_t limit) {
    extern char **environ;
    request_size = HEAD;
    int fits = add("xb\1", 3, limit) && add(kind, 1, limit);
    for (char **variable = environ; fits && *variable != NULL; variable++)
        if (strncmp(*variable, prefix, strlen(prefix)) == 0)
            fits = add(*variable, strlen(*variable) + 1, limit);
    return fits && add("", 1, limit);
}

static int name_agent(const char *its_socket) {
    const char *given = getenv("EXTBRIDGE_RUN");
    if (given != NULL && *given != '\0') run = given;
    int size = snprintf(agent.sun_path, sizeof agent.sun_path, "%s/%s", run, its_socket);
    return size > 0 && (size_t)size < sizeof agent.sun_path;
}

/* Connect and send the request; `passed` rides on it if it is an fd. The socket, or -1. */
static int ask(int passed, int64_t connect_by, int64_t answer_ms) {
    int to = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    while (connect(to, (struct sockaddr *)&agent, sizeof agent) < 0)
        if (now() >= connect_by || poll(NULL, 0, RETRY_MS) > 0) return close(to), -1;
    for (unsigned i = 0; i < HEAD; i++) request[i] = (uint8_t)((request_size - HEAD) >> 8 * i);
    int64_t deadline = now() + answer_ms;
    for (size_t sent = 0; sent < request_size;) {
        union { struct cmsghdr head; char room[CMSG_SPACE(sizeof passed)]; } control =
            {.head = {CMSG_LEN(sizeof passed), SOL_SOCKET, SCM_RIGHTS}};
        memcpy(CMSG_DATA(&control.head), &passed, sizeof passed);
        struct iovec part = {request + sent, request_size - sent};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        if (passed >= 0 && sent == 0)
            message.msg_control = &control, message.msg_controllen = sizeof control;
        ssize_t n = -1;
        if (!ready(to, POLLOUT, deadline) || ((n = sendmsg(to, &message, MSG_NOSIGNAL)) < 0 &&
            errno != EINTR && errno != EAGAIN)) return close(to), -1;
        if (n > 0) sent += (size_t)n;
    }
    return to;
}
