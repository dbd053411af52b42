/* The shim in the CNI folder and, under the name extbridge-exec, the launcher in a VM's container.
 *
 * docs/protocol.md says what goes over the wire; cni/extbridge/node/wire.py is the agent's side.
 * What a request means is the agent's to say: nothing is parsed here, and nothing allocated. */
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
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SECOND
#define SECOND 1000 /* Milliseconds; a test has shorter ones. */
#endif
enum { CONNECT_MS = 5 * SECOND, STDIO_MS = 5 * SECOND, RETRY_MS = 20 };
enum { CNI_ANSWER_MS = 60 * SECOND, TAP_ANSWER_MS = 10 * SECOND };
enum { MAX_CNI = 2 << 20, MAX_STDIN = 1 << 20, MAX_TAP = 256 << 10, MAX_TAP_ANSWER = 512 << 10 };
enum { U32 = 4, MAX_FDS = 250, MAX_ARGS = 1 << 16, REFUSED = 125, NO_EXEC = 126, NOT_FOUND = 127 };

#define VERSIONS "\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]"
#define JSON "{\"cniVersion\":\"1.1.0\","
#define FAIL(code, text) say(STDOUT_FILENO, 1, JSON "\"code\":" #code ",\"msg\":\"", text, "\"}\n")
#define REFUSE(status, text) say(STDERR_FILENO, status, "extbridge-exec: ", text, "\n")
#define NO_ANSWER "the extbridge agent of this node does not answer"

static const char *run = "/run/extbridge";
static struct sockaddr_un agent = {.sun_family = AF_UNIX};
static uint8_t request[U32 + MAX_CNI], answer[MAX_CNI + 1];
static size_t request_size, answer_size;
static int64_t answer_by;
static int fds[MAX_FDS];
static union { struct cmsghdr head; char room[CMSG_SPACE(sizeof fds)]; } control;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000) + time.tv_nsec / 1000000;
}

/* Reads or writes `size` bytes, fewer where the other side has ended; SIZE_MAX for a failure. On a
 * socket, `rides` is what `control` has, or has room for, on the first byte; none on later ones. */
static size_t transfer(int fd, short events, void *data, size_t size, size_t *rides, int64_t by) {
    size_t done = 0;
    for (int64_t left; fd >= 0 && done < size && (left = by - now()) > 0;) {
        struct pollfd polled = {fd, events, 0};
        poll(&polled, 1, (int)left);
        if (!polled.revents) continue;
        /* So much fits into a pipe that polls writable (fs/pipe.c, pipe_poll): no blocking. */
        struct iovec part = {(char *)data + done, size - done < PIPE_BUF ? size - done : PIPE_BUF};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control};
        if (rides && done == 0) message.msg_controllen = *rides;
        ssize_t n;
        if (events == POLLIN)
            n = rides ? recvmsg(fd, &message, MSG_CMSG_CLOEXEC) : readv(fd, &part, 1);
        else
            n = rides ? sendmsg(fd, &message, MSG_NOSIGNAL) : writev(fd, &part, 1);
        if (n == 0) return done;
        if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (n < 0 || message.msg_flags & MSG_CTRUNC) break;
        if (rides && done == 0) *rides = message.msg_controllen;
        done += (size_t)n;
    }
    return done == size ? size : SIZE_MAX;
}

static int say(int to, int status, const char *before, const char *text, const char *after) {
    static char line[MAX_TAP_ANSWER];
    size_t size = (size_t)snprintf(line, sizeof line, "%s%s%s", before, text, after);
    return transfer(to, POLLOUT, line, size, NULL, now() + STDIO_MS) == size || status ? status : 1;
}

static uint32_t get_u32(const uint8_t *at) {
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Adds a string with its NUL to the request, and says what is wrong, if anything; so does begin. */
static const char *add(const char *string, size_t limit) {
    size_t size = strlen(string) + 1;
    if (size > U32 + limit - request_size) return "environment and command are too long to send";
    memcpy(request + request_size, string, size);
    request_size += size;
    return NULL;
}

/* The agent's address, and the request up to its body in at most `limit` bytes. */
static const char *begin(const char *name, const char *magic, const char *prefix, size_t limit) {
    const char *given = getenv("EXTBRIDGE_RUN"), *fault = NULL;
    if (given && *given) run = given;
    int size = snprintf(agent.sun_path, sizeof agent.sun_path, "%s/%s", run, name);
    if ((size_t)size >= sizeof agent.sun_path) return "EXTBRIDGE_RUN is too long for a socket";
    memcpy(request + U32, magic, U32);
    request_size = U32 + U32;
    for (char **variable = environ; *variable && !fault; variable++)
        if (strncmp(*variable, prefix, strlen(prefix)) == 0) fault = add(*variable, limit);
    return fault ? fault : add("", limit);
}

/* Connects and sends the request, with the fd `passed` unless that is -1; the connection, or -1. */
static int ask(int passed, int64_t connect_by, int64_t patience) {
    int peer = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    while (connect(peer, (struct sockaddr *)&agent, sizeof agent) < 0) {
        if (now() >= connect_by) return -1;
        poll(NULL, 0, RETRY_MS);
    }
    answer_by = now() + patience;
    for (unsigned i = 0; i < U32; i++) request[i] = (uint8_t)((request_size - U32) >> 8 * i);
    size_t rides = passed < 0 ? 0 : CMSG_SPACE(sizeof passed);
    control.head = (struct cmsghdr){CMSG_LEN(sizeof passed), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.head), &passed, sizeof passed);
    transfer(peer, POLLOUT, request, request_size, &rides, answer_by);
    return peer;
}

/* The next frame into `answer`, a NUL behind it, and its fds into `fds`; how many, or -1. */
static int receive(int peer, size_t limit, size_t max_fds) {
    size_t rides = max_fds ? CMSG_SPACE(max_fds * sizeof *fds) : 0, none = 0;
    if (transfer(peer, POLLIN, answer, U32, &rides, answer_by) != U32) return -1;
    answer_size = get_u32(answer);
    if (answer_size > limit) return -1;
    if (transfer(peer, POLLIN, answer, answer_size, &none, answer_by) != answer_size) return -1;
    answer[answer_size] = '\0';
    size_t size = rides ? control.head.cmsg_len - CMSG_LEN(0) : 0;
    memcpy(fds, CMSG_DATA(&control.head), size);
    return (int)(size / sizeof *fds);
}

static int spool(void) {
    char folder[sizeof agent.sun_path], draft[64];
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    snprintf(folder, sizeof folder, "%s/spool", run);
    snprintf(draft, sizeof draft, ".%jd.%09ld-%d", (intmax_t)time.tv_sec, time.tv_nsec, getpid());
    mkdir(run, 0700);
    mkdir(folder, 0700);
    int in = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int file = openat(in, draft, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    size_t size = request_size - U32;
    if (transfer(file, POLLOUT, request + U32, size, NULL, now() + STDIO_MS) == size &&
        fsync(file) == 0 && renameat(in, draft, in, draft + 1) == 0 && fsync(in) == 0) return 0;
    unlinkat(in, draft, 0);
    return FAIL(5, NO_ANSWER ", and its spool takes no DEL: give EXTBRIDGE_RUN room, writable");
}

static int carry(void) {
    const char *asked = getenv("CNI_COMMAND"), *netns = getenv("CNI_NETNS");
    const char *verb = asked ? asked : "";
    const char *fault = begin("cni.sock", "xb\1C", "CNI_", MAX_CNI - MAX_STDIN - 1);
    size_t size = transfer(STDIN_FILENO, POLLIN, request + request_size, MAX_STDIN + 1, NULL,
                           now() + STDIO_MS);
    if (strcmp(verb, "VERSION") == 0) return say(STDOUT_FILENO, 0, JSON, VERSIONS, "}\n");
    if (fault) return FAIL(4, fault);
    if (size == SIZE_MAX) return FAIL(5, "standard input cannot be read, or has no end");
    if (size > MAX_STDIN) return FAIL(6, "standard input is longer than 1 MiB");
    request_size += size;
    int passed = netns ? open(netns, O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;
    for (int64_t connect_by = now() + CONNECT_MS;; poll(NULL, 0, RETRY_MS)) {
        int peer = ask(passed, connect_by, CNI_ANSWER_MS);
        if (receive(peer, MAX_CNI, 0) == 0 && answer_size >= U32 && get_u32(answer) <= UINT8_MAX)
            break;
        close(peer);
        if (strcmp(verb, "STATUS") == 0) return FAIL(50, NO_ANSWER);
        if (strcmp(verb, "DEL") != 0) return FAIL(11, NO_ANSWER);
        if (now() >= connect_by) return spool();
    }
    size = answer_size - U32;
    return transfer(STDOUT_FILENO, POLLOUT, answer + U32, size, NULL, now() + STDIO_MS) == size
               ? answer[0] : EXIT_FAILURE;
}

static int launch(char **argv) {
    static char *command[MAX_ARGS + 1];
    const char *fault = begin("pod/tap.sock", "xb\1T", "EXTBRIDGE_", MAX_TAP);
    for (char **argument = argv; *argument && !fault; argument++) fault = add(*argument, MAX_TAP);
    if (!*argv) fault = "give the command to run";
    if (fault) return REFUSE(REFUSED, fault);
    int n, peer = ask(-1, now() + CONNECT_MS, TAP_ANSWER_MS);
    size_t at;
    do {
        n = receive(peer, MAX_TAP_ANSWER, MAX_FDS);
        at = (size_t)(2 + n) * U32;
        if (n < 0 || answer_size < at || get_u32(answer + U32) != (uint32_t)n)
            return REFUSE(REFUSED, NO_ANSWER);
        if (get_u32(answer) != 0)
            return REFUSE(get_u32(answer) <= UINT8_MAX ? answer[0] : REFUSED, (char *)answer + at);
        /* From the last on: numbers and fds both ascend, and an fd lies below its number, so no
         * number is that of a tap which has not moved yet. */
        for (int i = n; i-- > 0; close(fds[i]))
            if (fcntl(fds[i], F_DUPFD, (int)get_u32(answer + (2 + i) * U32)) !=
                (int)get_u32(answer + (2 + i) * U32))
                return REFUSE(REFUSED, "a number that a tap's fd must have is not free");
    } while (at == answer_size && n > 0);
    for (size_t i = 0; at < answer_size && i < MAX_ARGS; at += strlen(command[i++]) + 1)
        command[i] = (char *)answer + at;
    if (!command[0] || at < answer_size) return REFUSE(REFUSED, NO_ANSWER);
    execvp(command[0], command);
    return errno == ENOENT ? REFUSE(NOT_FOUND, "the command is not found")
                           : REFUSE(NO_EXEC, "the command cannot be executed");
}

int main(int argc, char **argv) {
    const char *path = argc > 0 ? argv[0] : "", *slash = strrchr(path, '/');
    return strcmp(slash ? slash + 1 : path, "extbridge-exec") == 0 ? launch(argv + 1) : carry();
}
