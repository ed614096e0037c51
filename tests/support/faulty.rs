//! A WebSocket server that fans out as tabcast does, and does one thing wrong.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::support::masked;

/// What it does to one of the messages, for one of its tabs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    Loses,
    Doubles,
    /// Swaps two that follow each other.
    Reorders,
    /// Sends one tab what is for another user.
    Misaddresses,
    /// Ends one tab's connection.
    Cuts,
    /// Refuses a request.
    Refuses,
    /// Takes requests, and does nothing.
    Sleeps,
}

/// Which message is treated so, counted over all.
const AT: usize = 30;

struct Room {
    fault: Fault,
    tabs: Vec<TcpStream>,
    messages: usize,
    held: Vec<u8>,
}

/// Serves until the process ends.
pub(crate) fn serve(fault: Fault) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let room = Arc::new(Mutex::new(Room { fault, tabs: Vec::new(), messages: 0, held: Vec::new() }));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (room, mut stream) = (Arc::clone(&room), stream.unwrap());
            stream.set_nodelay(true).unwrap();
            std::thread::spawn(move || {
                let head = head(&mut stream);
                if head.starts_with("GET ") { tab(stream, &room) } else { publisher(stream, &head, &room) }
            });
        }
    });
    address
}

fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            break;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// A text of the server, without a mask.
fn frame(text: &[u8]) -> Vec<u8> {
    let mut frame = masked(1, text);
    // The mask and its bit: tests only send texts whose length has two bytes.
    frame[1] &= 0x7f;
    frame.truncate(4);
    frame.extend_from_slice(text);
    frame
}

fn tab(mut stream: TcpStream, room: &Mutex<Room>) {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    stream.write_all(switch.as_bytes()).unwrap();
    // It reads the join, and acks it once the tab is in the room.
    let mut join = [0; 4096];
    if stream.read(&mut join).unwrap() == 0 {
        return;
    }
    let mut room = room.lock().unwrap();
    let ack = r#"{"type":"ack","client_id":"join"}"#;
    stream.write_all(&[&[0x81, u8::try_from(ack.len()).unwrap()], ack.as_bytes()].concat()).unwrap();
    room.tabs.push(stream);
}

fn publisher(mut stream: TcpStream, first: &str, room: &Mutex<Room>) {
    let mut request = first.to_owned();
    while !request.is_empty() {
        let length = request.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body).unwrap();
        if room.lock().unwrap().fault == Fault::Sleeps {
            std::thread::park();
        }
        let answer = room.lock().unwrap().publish(&body);
        stream.write_all(format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n").as_bytes()).unwrap();
        request = head(&mut stream);
    }
}

impl Room {
    fn publish(&mut self, body: &[u8]) -> &'static str {
        self.messages += 1;
        let is_it = self.messages == AT;
        let frame = frame(body);
        let held = std::mem::take(&mut self.held);
        for (at, tab) in self.tabs.iter_mut().enumerate() {
            let is_it = is_it && at == 0;
            let mut write = |bytes: &[u8]| drop(tab.write_all(bytes));
            match self.fault {
                Fault::Loses if is_it => {}
                Fault::Doubles if is_it => write(&[frame.as_slice(), &frame].concat()),
                Fault::Reorders if is_it => self.held.clone_from(&frame),
                Fault::Misaddresses if is_it => {
                    let text = String::from_utf8(frame[4..].to_vec()).unwrap();
                    // Right behind the record, in the place of what fills the message up.
                    let at = text.find(" S=").unwrap() + 11;
                    let text = [&text[..at], " U=0000beef", &text[at + 11..]].concat();
                    write(&self::frame(text.as_bytes()));
                }
                Fault::Cuts if is_it => tab.shutdown(std::net::Shutdown::Both).unwrap(),
                _ => {
                    write(&frame);
                    if at == 0 {
                        write(&held);
                    }
                }
            }
        }
        if is_it && self.fault == Fault::Refuses { "503 Service Unavailable" } else { "200 OK" }
    }
}
