//! A small blocking ManageSieve client.

use super::imap::text;
use anyhow::bail;
use base64::Engine as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A session.
pub struct Sieve {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Sieve {
    pub fn login(address: SocketAddr, login: &str, password: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_nodelay(true)?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut sieve = Self { stream, reader };
        sieve.answer()?;
        let secret = base64::engine::general_purpose::STANDARD.encode(format!("\0{login}\0{password}"));
        sieve.ok(format!("AUTHENTICATE \"PLAIN\" \"{secret}\"\r\n").as_bytes())?;
        Ok(sieve)
    }

    /// Names of the scripts, and whether each is the active one.
    pub fn list(&mut self) -> anyhow::Result<Vec<(String, bool)>> {
        let lines = self.ok(b"LISTSCRIPTS\r\n")?;
        let scripts = lines.iter().filter_map(|line| {
            let line = text(line);
            let (name, rest) = line.strip_prefix('"')?.rsplit_once('"')?;
            Some((name.replace("\\\"", "\"").replace("\\\\", "\\"), rest.contains("ACTIVE")))
        });
        Ok(scripts.collect())
    }

    pub fn get(&mut self, name: &str) -> anyhow::Result<Vec<u8>> {
        let lines = self.ok(format!("GETSCRIPT \"{name}\"\r\n").as_bytes())?;
        match lines.first() {
            Some(line) if lines.len() > 1 => {
                let end = line.iter().position(|&byte| byte == b'\n').unwrap_or_default();
                Ok(line[end + 1..].to_vec())
            }
            _ => Ok(Vec::new()),
        }
    }

    pub fn put(&mut self, name: &str, script: &str) -> anyhow::Result<()> {
        self.ok(format!("PUTSCRIPT \"{name}\" {{{}+}}\r\n{script}\r\n", script.len()).as_bytes()).map(drop)
    }

    /// An empty name deactivates all.
    pub fn activate(&mut self, name: &str) -> anyhow::Result<()> {
        self.ok(format!("SETACTIVE \"{name}\"\r\n").as_bytes()).map(drop)
    }

    pub fn delete(&mut self, name: &str) -> anyhow::Result<()> {
        self.ok(format!("DELETESCRIPT \"{name}\"\r\n").as_bytes()).map(drop)
    }

    fn ok(&mut self, command: &[u8]) -> anyhow::Result<Vec<Vec<u8>>> {
        self.stream.write_all(command)?;
        let lines = self.answer()?;
        let last = lines.last().map(|line| text(line)).unwrap_or_default();
        if !last.to_ascii_uppercase().starts_with("OK") {
            bail!("{} → {}", text(&command[..command.len().min(40)]).trim_end(), last.trim_end());
        }
        Ok(lines)
    }

    /// Lines, each with the literal it ends in, up to the one that says how it went.
    fn answer(&mut self) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        loop {
            let mut line = Vec::new();
            if self.reader.read_until(b'\n', &mut line)? == 0 {
                bail!("timsieved closed the connection");
            }
            let last = ["OK", "NO", "BYE"].iter().any(|word| text(&line).to_ascii_uppercase().starts_with(word));
            if let Some(length) = literal_length(&line) {
                let start = line.len();
                line.resize(start + length, 0);
                self.reader.read_exact(&mut line[start..])?;
            }
            lines.push(line);
            if last {
                return Ok(lines);
            }
        }
    }
}

fn literal_length(line: &[u8]) -> Option<usize> {
    let line = text(line);
    let line = line.strip_suffix("}\r\n")?;
    line.rsplit_once('{')?.1.trim_end_matches('+').parse().ok()
}
