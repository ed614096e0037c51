// Types of `tabcast.js`. Keep the two files beside each other: `import { Tabcast } from "./tabcast.js"` then has them.

/**
 * Why something that was sent came to nothing: codes of `error` frames, of HTTP errors where it was sent by POST, and
 * `outbox_full` and `closed`, which are the client's own. See the README's "Codes".
 */
export type ErrorCode =
  | "bad_frame"
  | "bad_field"
  | "too_large"
  | "forbidden"
  | "limit_reached"
  | "rate_limited"
  | "overloaded"
  | "draining"
  | "bad_request"
  | "bad_user"
  | "not_found"
  | "method_not_allowed"
  | "unsupported_media_type"
  | "outbox_full"
  | "closed";

export class TabcastError extends Error {
  constructor(code: ErrorCode, message: string);
  readonly name: "TabcastError";
  readonly code: ErrorCode;
}

/** 128 random bits in hexadecimal. */
export function randomId(): string;

// ---- what comes ----

export interface Button {
  label: string;
  custom_id: string;
  emoji?: string;
  style?: "primary" | "secondary" | "success" | "danger" | "link" | "premium";
  url?: string;
  disabled?: boolean;
}

export interface MessageFrame {
  type: "message";
  id: string;
  text: string;
  /** A user id: the bot's, or that of whoever wrote it. */
  sender: string;
  reply_to?: string;
  /** There, perhaps empty, if it is a message with buttons. */
  buttons?: Button[];
  /** Seconds since 1970, with a fraction. */
  timestamp: number;
}

export interface FileFrame {
  type: "file";
  id: string;
  filename: string;
  mimetype: string;
  /** Base64, with padding. */
  data: string;
  /** Bytes before that. */
  size: number;
  timestamp: number;
}

/** The whole text of a message, once more. */
export interface EditFrame {
  type: "edit";
  /** That of the edited message. */
  id: string;
  text: string;
  timestamp: number;
}

export interface TypingFrame {
  type: "typing";
  active: boolean;
}

export interface EndFrame {
  type: "end";
  reason: "stop" | "error" | "timeout" | "cancelled";
}

/** Comes first, to who connects with `hello: "1"` in its query. */
export interface HelloFrame {
  type: "hello";
  session: string;
  server_time: number;
  limits: { message_bytes_max: number; attachment_bytes_max: number };
}

export interface AckFrame {
  type: "ack";
  client_id: string;
  /** The id of the message that came of it, if one did. */
  id?: string;
}

/** Reaches listeners only if nobody who sent something waits for it. */
export interface ErrorFrame {
  type: "error";
  code: ErrorCode;
  message: string;
  client_id?: string;
  /** A room that was joined, and is refused after a reconnect. It is asked for again if the code says that this passes. */
  room?: string;
}

export interface PongFrame {
  type: "pong";
  client_id?: string;
}

/** Something was missed: after a position that is not known any more, in a room, or on its way from another node. */
export interface GapFrame {
  type: "gap";
  reason: "unknown_position" | "room_not_kept" | "lost_between_nodes";
  count?: number;
}

/** The server leaves; the client comes back by itself after that time. */
export interface DrainingFrame {
  type: "draining";
  retry_after_ms: number;
}

export type Frame =
  | MessageFrame
  | FileFrame
  | EditFrame
  | TypingFrame
  | EndFrame
  | HelloFrame
  | AckFrame
  | ErrorFrame
  | PongFrame
  | GapFrame
  | DrainingFrame;

// ---- what goes ----

export interface Attachment {
  filename: string;
  mimetype?: string;
  /** Base64. */
  data: string;
}

export type OutgoingFrame =
  | { type: "message"; text: string; reply_to?: string; room?: string; attachments?: Attachment[]; client_id?: string }
  | { type: "button"; message_id: string; custom_id: string; room?: string; client_id?: string };

export interface Acked {
  /** The message's id, by which it comes to other tabs, can be answered and is edited. */
  id?: string;
}

// ---- the connection ----

export type State =
  | { readonly name: "idle" | "connecting" | "unauthorized" }
  /** `events`: WebSockets do not get through; it goes on over an event stream and POST. */
  | { readonly name: "online"; readonly transport: "websocket" | "events" }
  /** `retryAt`: milliseconds since 1970. `ordered`: the server named the moment. */
  | { readonly name: "waiting"; readonly retryAt: number; readonly ordered: boolean; readonly code: number }
  /** The browser knows of no network. */
  | { readonly name: "offline"; readonly code: number }
  /** For good: a close code, or 403 if the server refuses this page or this token. */
  | { readonly name: "closed"; readonly code: number; readonly reason: string };

/** Every limit, with its unit in its name; `tabcast.js` says what each is. */
export interface Limits {
  backoffMs: number;
  backoffMaxMs: number;
  stableMs: number;
  tokenMs: number;
  handshakeMs: number;
  ackMs: number;
  silenceMs: number;
  webSocketRetryMs: number;
  postMs: number;
  pongMs: number;
  uploadCharsPerSecondMin: number;
  outboxFramesMax: number;
  outboxCharsMax: number;
  positionsMax: number;
  typingMs: number;
}

export interface Ending {
  code: number;
  reason: string;
  /** Of an HTTP answer that was not an event stream. */
  status?: number;
  retryAfterMs?: number | null;
}

export interface LinkOptions {
  base: string;
  path: string;
  query: Record<string, string>;
  /** The ids of the last frames that are here, the newest first, with commas between; empty if there is none. */
  after: string;
  rooms: string[];
  token: string | null;
  postMs: number;
  uploadCharsPerSecondMin: number;
  open(): void;
  text(text: string): void;
  reply(text: string): void;
  alive(): void;
  close(ending: Ending): void;
}

export interface Link {
  send(text: string): void;
  close(code?: number, reason?: string): void;
  /** Needed where `hears` is true: whether something that was sent has not been answered yet. */
  isSending?(): boolean;
  /** Whether the server's own signs of life are seen here; rooms are then joined by opening. */
  readonly hears?: boolean;
  /** There if `hears` is true: begins to send nothing more, and resolves once nothing is under way. */
  leave?(): Promise<unknown>;
}

export function webSocketLink(options: LinkOptions): Link;
export function eventStreamLink(options: LinkOptions): Link;

export interface TabcastOptions {
  /** Where the server is. In a page, by default, where the page is from; elsewhere it is needed. */
  url?: string | URL;
  /** Default `/ws`. */
  path?: string;
  /** Default `/events`; null: no fallback. */
  events?: string | null;
  /** Parameters of the address: `{ hello: "1" }`; in development mode also `user` and `name`. */
  query?: () => Record<string, string>;
  /** A token; null: none is needed; undefined: there is none, stop. If it throws or takes longer than `tokenMs`, it is asked again later. */
  token?: (reason: "start" | "reconnect" | "expired" | "refused") => string | null | undefined | Promise<string | null | undefined>;
  link?: (options: LinkOptions) => Link;
  limits?: Partial<Limits>;
}

export interface TabcastEventMap {
  state: CustomEvent<State>;
  message: CustomEvent<MessageFrame>;
  file: CustomEvent<FileFrame>;
  edit: CustomEvent<EditFrame>;
  typing: CustomEvent<TypingFrame>;
  end: CustomEvent<EndFrame>;
  hello: CustomEvent<HelloFrame>;
  ack: CustomEvent<AckFrame>;
  error: CustomEvent<ErrorFrame>;
  pong: CustomEvent<PongFrame>;
  gap: CustomEvent<GapFrame>;
  draining: CustomEvent<DrainingFrame>;
}

export class Tabcast extends EventTarget {
  constructor(options?: TabcastOptions);
  readonly state: State;
  /** Connects, or, if it waits to do so, does it now. */
  connect(): void;
  /** Ends the connection and starts another, in the same rooms, for a changed identity. What is in the outbox is refused. */
  restart(): void;
  /** Ends the connection for good. */
  close(): void;
  /**
   * Sends, now or once connected, again after a loss, until it is acked.
   * @throws {TabcastError} by rejecting: it was refused, too much waits, or the connection is over.
   */
  send(frame: OutgoingFrame): Promise<Acked>;
  /**
   * Joins a room, again after each reconnect; a refusal after that is an `error` event with the `room`.
   * @throws {TabcastError} by rejecting: it was refused, left before it was joined, or the connection is over.
   */
  join(room: string): Promise<void>;
  leave(room: string): void;
  /** Says, now and then, that the person types. */
  typing(active: boolean, room?: string): void;
  /** Asks for a sign of life, and starts anew if none comes. */
  check(): void;
  addEventListener<K extends keyof TabcastEventMap>(
    type: K,
    listener: (this: Tabcast, event: TabcastEventMap[K]) => unknown,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions): void;
  removeEventListener<K extends keyof TabcastEventMap>(
    type: K,
    listener: (this: Tabcast, event: TabcastEventMap[K]) => unknown,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | EventListenerOptions): void;
}
