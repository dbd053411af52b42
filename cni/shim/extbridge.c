/* The shim in the CNI folder and, under the name extbridge-exec, the launcher in a VM's container.
 * docs/protocol.md says what goes over the wire; cni/extbridge/node/wire.py is the agent's side.
 * What a request means is the agent's to say: nothing is parsed here, and nothing allocated. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
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
enum { CONNECT_MS = 5 * SECOND, STDIO_MS = 5 * SECOND, CNI_ANSWER_MS = 60 * SECOND };
enum { TAP_ANSWER_MS = 10 * SECOND, RETRY_MS = 20, REFUSED = 125, NO_EXEC = 126, NOT_FOUND = 127 };
enum { MAX_CNI = 2 << 20, MAX_STDIN = 1 << 20, MAX_TAP = 256 << 10, MAX_TAP_ANSWER = 512 << 10 };
enum { U32 = 4, CHUNK = 4096, MAX_FDS = 250, MAX_ARGS = 1 << 16, MAX_STATUS = 255, NOTHING = -2 };
#define VERSIONS "\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]"
#define JSON "{\"cniVersion\":\"1.1.0\","
#define FAIL(code, text) say(STDOUT_FILENO, 1, JSON "\"code\":" #code ",\"msg\":\"", text, "\"}\n")
#define REFUSE(status, text) say(STDERR_FILENO, status, "extbridge-exec: ", text, "\n")
#define NO_ANSWER "this node's extbridge agent gives no answer: does it run? (errors.md#no-answer)"

static const char *run = "/run/extbridge";
static struct sockaddr_un agent = {.sun_family = AF_UNIX};
static uint32_t request[1 + MAX_CNI / U32], answer[MAX_CNI / U32 + 1];
static size_t request_size, answer_size;
static int64_t answer_by;
static int status;
/* A struct cmsghdr, and the fds behind it (man 3 cmsg). */
static struct { size_t size; int level, type, fds[MAX_FDS]; } control = {
    .level = SOL_SOCKET, .type = SCM_RIGHTS};

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000) + time.tv_nsec / 1000000;
}

/* Reads or writes `size` bytes, fewer where the other side has ended; SIZE_MAX for a failure. With
 * `rides`, on a socket: as much of `control` goes with the first byte, or may come; none later. */
static size_t transfer(int fd, short events, void *data, size_t size, size_t *rides) {
    int64_t left, by = rides ? answer_by : now() + STDIO_MS;
    size_t done = 0;
    while (fd >= 0 && done < size && (left = by - now()) > 0) {
        struct pollfd polled = {fd, events, 0};
        if (poll(&polled, 1, (int)left) <= 0) continue;
        /* A pipe that polls writable takes PIPE_BUF without blocking (fs/pipe.c, pipe_poll). */
        struct iovec part = {(char *)data + done, size - done < CHUNK ? size - done : CHUNK};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control};
        message.msg_controllen = rides && done == 0 ? (socklen_t)*rides : 0;
        ssize_t n = events == POLLIN
            ? (rides ? recvmsg(fd, &message, MSG_CMSG_CLOEXEC) : readv(fd, &part, 1))
            : (rides ? sendmsg(fd, &message, MSG_NOSIGNAL) : writev(fd, &part, 1));
        if (n == 0) return done;
        /* A connection that is reset is at its end the next time (unix_stream_read_generic). */
        if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == ECONNRESET)) continue;
        if (n < 0 || message.msg_flags & MSG_CTRUNC) break;
        if (rides && done == 0) *rides = message.msg_controllen;
        done += (size_t)n;
    }
    return done == size ? size : SIZE_MAX;
}

static int say(int to, int end, const char *before, const char *text, const char *after) {
    static char line[MAX_TAP_ANSWER + 64];
    size_t size = (size_t)snprintf(line, sizeof line, "%s%s%s", before, text, after);
    return transfer(to, POLLOUT, line, size, NULL) == size || end != 0 ? end : 1;
}

/* Adds a string with its NUL to the request, and says what is wrong, if anything; so does begin. */
static const char *add(const char *string, size_t limit) {
    size_t size = strlen(string) + 1;
    if (size > U32 + limit - request_size) return "environment and command are too long to send";
    memcpy((char *)request + request_size, string, size);
    request_size += size;
    return NULL;
}

/* The agent's address, and the request up to its body in at most `limit` bytes. */
static const char *begin(const char *name, const char *magic, const char *prefix, size_t limit) {
    const char *given = getenv("EXTBRIDGE_RUN"), *fault = NULL;
    if (given && *given) run = given;
    int size = snprintf(agent.sun_path, sizeof agent.sun_path, "%s/%s", run, name);
    if ((size_t)size >= sizeof agent.sun_path) return "EXTBRIDGE_RUN is too long for a socket";
    memcpy(request + 1, magic, U32);
    request_size = U32 + U32;
    for (char **variable = environ; *variable && !fault; variable++)
        if (strncmp(*variable, prefix, strlen(prefix)) == 0) fault = add(*variable, limit);
    return fault ? fault : add("", limit);
}

/* Connects and sends the request, with the fd `passed` unless that is -1; the connection, or -1. */
static int ask(int passed, int64_t connect_by, int64_t patience) {
    int peer = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    for (; connect(peer, (struct sockaddr *)&agent, sizeof agent) < 0; poll(NULL, 0, RETRY_MS))
        if (now() >= connect_by) return -1;
    answer_by = now() + patience;
    request[0] = htole32((uint32_t)(request_size - U32));
    control.size = CMSG_LEN(sizeof passed);
    control.fds[0] = passed;
    size_t rides = passed < 0 ? 0 : control.size;
    transfer(peer, POLLOUT, request, request_size, &rides);
    return peer;
}

/* The next frame into `answer`, a NUL behind it, its fds into `control`: how many; -1; NOTHING. */
static int receive(int peer, size_t limit, size_t rides) {
    size_t head = transfer(peer, POLLIN, answer, U32, &rides);
    if (head != U32) return head == 0 ? NOTHING : -1;
    answer_size = le32toh(answer[0]);
    if (answer_size < U32 || answer_size > limit) return -1;
    if (transfer(peer, POLLIN, answer, answer_size, &(size_t){0}) != answer_size) return -1;
    ((char *)answer)[answer_size] = '\0';
    status = (int)le32toh(answer[0]);
    if (status < 0 || status > MAX_STATUS) return -1;
    return rides ? (int)((control.size - CMSG_LEN(0)) / sizeof *control.fds) : 0;
}

static int spool(void) {
    char folder[sizeof agent.sun_path], draft[64];
    snprintf(folder, sizeof folder, "%s/spool", run);
    snprintf(draft, sizeof draft, ".%jd-%d", (intmax_t)now(), getpid());
    if (mkdir(run, 0700) == 0 || errno == EEXIST) mkdir(folder, 0700);
    int in = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int file = openat(in, draft, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (transfer(file, POLLOUT, request + 1, request_size - U32, NULL) == request_size - U32 &&
        fsync(file) == 0 && renameat(in, draft, in, draft + 1) == 0 && fsync(in) == 0) return 0;
    unlinkat(in, draft, 0);
    return FAIL(5, NO_ANSWER " And its spool takes no DEL: give EXTBRIDGE_RUN room, writable");
}

static int carry(void) {
    const char *verb = getenv("CNI_COMMAND"), *netns = getenv("CNI_NETNS");
    if (!verb) verb = "";
    const char *fault = begin("cni.sock", "xb\1C", "CNI_", MAX_CNI - MAX_STDIN - 1);
    char *body = (char *)request + request_size;
    size_t size = transfer(STDIN_FILENO, POLLIN, body, MAX_STDIN + 1, NULL);
    if (strcmp(verb, "VERSION") == 0) return say(STDOUT_FILENO, 0, JSON, VERSIONS, "}\n");
    if (fault) return FAIL(4, fault);
    if (size == SIZE_MAX) return FAIL(5, "standard input cannot be read, or has no end");
    if (size > MAX_STDIN) return FAIL(6, "standard input is longer than 1 MiB");
    request_size += size;
    int passed = netns ? open(netns, O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;
    for (int64_t connect_by = now() + CONNECT_MS;; poll(NULL, 0, RETRY_MS)) {
        int peer = ask(passed, connect_by, CNI_ANSWER_MS);
        if (receive(peer, MAX_CNI, 0) == 0) break;
        close(peer);
        if (strcmp(verb, "STATUS") == 0) return FAIL(50, NO_ANSWER);
        if (strcmp(verb, "DEL") != 0) return FAIL(11, NO_ANSWER);
        if (now() >= connect_by) return spool();
    }
    size = answer_size - U32;
    return transfer(STDOUT_FILENO, POLLOUT, answer + 1, size, NULL) == size ? status : 1;
}

static int launch(int argc, char **argv) {
    static char *command[MAX_ARGS + 1];
    const char *fault = begin("pod/tap.sock", "xb\1T", "EXTBRIDGE_", MAX_TAP);
    for (int i = 1; i < argc && !fault; i++) fault = add(argv[i], MAX_TAP);
    if (argc < 2 || fault) return REFUSE(REFUSED, fault ? fault : "give the command to run");
    int64_t by = now() + CONNECT_MS;
    int n, peer;
    char *at, *end;
    /* An agent that ends hangs up on those who wait. To ask again is safe: a holder may. */
    do n = receive(peer = ask(-1, by, TAP_ANSWER_MS), MAX_TAP_ANSWER, sizeof control);
    while (n == NOTHING && now() < by && close(peer) == 0 && poll(NULL, 0, RETRY_MS) == 0);
    for (;; n = receive(peer, MAX_TAP_ANSWER, sizeof control)) {
        at = (char *)(answer + 2 + n);
        end = (char *)answer + answer_size;
        if (n < 0 || at > end || (int)le32toh(answer[1]) != n) return REFUSE(REFUSED, NO_ANSWER);
        if (status != 0) return REFUSE(status, at);
        /* The last first: fds and numbers ascend, so none has the number of one yet to be moved. */
        for (int i = n - 1; i >= 0; i--) {
            int number = (int)le32toh(answer[2 + i]);
            if (number < 0 || fcntl(control.fds[i], F_DUPFD, number) != number)
                return REFUSE(REFUSED, "a number that a tap's fd must have is not free");
            close(control.fds[i]);
        }
        if (at < end || n == 0) break;
    }
    for (int i = 0; at < end && i < MAX_ARGS; at += strlen(at) + 1) command[i++] = at;
    if (!command[0] || at < end) return REFUSE(REFUSED, NO_ANSWER);
    execvp(command[0], command);
    return REFUSE(errno == ENOENT ? NOT_FOUND : NO_EXEC, strerror(errno));
}

int main(int argc, char **argv) {
    return strcmp(program_invocation_short_name, "extbridge-exec") ? carry() : launch(argc, argv);
}
